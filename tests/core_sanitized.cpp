// Runs nested_block, forward and backward, on one and on four threads of the
// core's own pool, for a build with a sanitizer. Exits with 1 where the bits differ.
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "common/parallel.h"
#include "nested_block.h"

// Of the one instruction set that this is compiled for: without dispatch.h no other operator is.
namespace convnest::CONVNEST_ISA {
void nested_block_forward(const NestedBlockFwdParams&);
void nested_block_backward(const NestedBlockBwdParams&);
}  // namespace convnest::CONVNEST_ISA

using namespace convnest;

namespace {

using Buffer = std::vector<float>;

Buffer numbers(std::int64_t count) {
    static unsigned seed = 1;
    Buffer values(static_cast<std::size_t>(count));
    for (float& value : values) {
        seed = seed * 1664525u + 1013904223u;
        value = static_cast<float>(seed >> 8) / 8388608.0f - 1.0f;
    }
    return values;
}

struct Block {
    std::int64_t N, H, W, C, D;
    int K;
    Buffer x = numbers(N * H * W * C), dy = numbers(N * H * W * C);
    Buffer fc1 = numbers(D * C), conv = numbers(D * K * K), fc2 = numbers(C * D), wide = numbers(D);

    // Every result, one after the other. `kept`: how many of h and u are.
    Buffer run(int threads, int kept) const {
        set_num_threads(threads);
        const std::int64_t pixels = N * H * W;
        Buffer y(pixels * C), t(pixels * C), h(kept > 0 ? pixels * D : 0);
        Buffer u(kept > 1 ? pixels * D : 0), mean(pixels), rstd(pixels), mean2(pixels),
            rstd2(pixels);
        NestedBlockFwdParams f{};
        f.x = x.data(), f.fc1_weight = fc1.data(), f.fc1_bias = f.conv_bias = wide.data();
        f.norm_weight = f.norm_bias = wide.data();
        f.conv_weight = conv.data(), f.fc2_weight = fc2.data();
        f.y = y.data(), f.h = kept > 0 ? h.data() : nullptr, f.u = kept > 1 ? u.data() : nullptr;
        f.mean = mean.data(), f.rstd = rstd.data(), f.t = t.data();
        f.post_mean = mean2.data(), f.post_rstd = rstd2.data();
        f.N = N, f.H = H, f.W = W, f.C = C, f.D = D, f.K = K, f.eps = 1e-6, f.shortcut = true;
        CONVNEST_ISA::nested_block_forward(f);
        Buffer dx(pixels * C), dfc1(D * C), dconv(D * K * K), dfc2(C * D), dwide(D), dnarrow(C);
        NestedBlockBwdParams b{};
        b.dy = dy.data(), b.x = f.x, b.h = f.h, b.u = f.u, b.mean = f.mean, b.rstd = f.rstd;
        b.t = f.t, b.post_mean = f.post_mean, b.post_rstd = f.post_rstd;
        b.fc1_weight = f.fc1_weight, b.fc1_bias = f.fc1_bias, b.norm_weight = f.norm_weight;
        b.norm_bias = f.norm_bias, b.conv_weight = f.conv_weight, b.conv_bias = f.conv_bias;
        b.fc2_weight = f.fc2_weight;
        b.dx = dx.data(), b.dfc1_weight = dfc1.data(), b.dconv_weight = dconv.data();
        b.dfc2_weight = dfc2.data(), b.dnorm_weight = dwide.data(), b.dpost_bias = dnarrow.data();
        b.N = N, b.H = H, b.W = W, b.C = C, b.D = D, b.K = K, b.eps = 1e-6, b.shortcut = true;
        CONVNEST_ISA::nested_block_backward(b);
        Buffer all;
        for (const Buffer* part : {&y, &dx, &dfc1, &dconv, &dfc2, &dwide, &dnarrow}) {
            all.insert(all.end(), part->begin(), part->end());
        }
        return all;
    }
};

}  // namespace

int main() {
    // In bands of rows, and in slices of channels.
    for (const Block& block :
         {Block{3, 16, 9, 5, 33, 7}, Block{1, 30, 6, 4, 20, 3}, Block{6, 7, 7, 5, 870, 7}}) {
        const Buffer expected = block.run(1, 2);
        for (int kept = 0; kept <= 2; ++kept) {
            for (int repeat = 0; repeat < 3; ++repeat) {
                const Buffer got = block.run(4, kept);
                if (std::memcmp(got.data(), expected.data(), got.size() * sizeof(float)) != 0) {
                    std::puts("other bits");
                    return 1;
                }
            }
        }
    }
    std::puts("same bits");
}
