// Runs nested_block and the wide operators, forward and backward, on one and on four threads of the
// core's own pool, for a build with a sanitizer. Exits with 1 where the bits differ.
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "common/parallel.h"
#include "dwconv_gelu_layernorm.h"
#include "gelu_layernorm.h"
#include "nested_block.h"
#include "nested_conv.h"

// Of the one instruction set that this is compiled for: dispatch.h would want them all.
namespace convnest::CONVNEST_ISA {
void nested_conv_forward(const NestedConvFwdParams&);
void nested_conv_backward(const NestedConvBwdParams&);
void dwconv_gelu_layernorm_forward(const DwconvGeluLayernormFwdParams&);
void dwconv_gelu_layernorm_backward(const DwconvGeluLayernormBwdParams&);
void gelu_layernorm_forward(const GeluLayernormFwdParams&);
void gelu_layernorm_backward(const GeluLayernormBwdParams&);
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

Buffer joined(std::initializer_list<const Buffer*> parts) {
    Buffer all;
    for (const Buffer* part : parts) all.insert(all.end(), part->begin(), part->end());
    return all;
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
        return joined({&y, &dx, &dfc1, &dconv, &dfc2, &dwide, &dnarrow});
    }
};

// nested_conv, dwconv_gelu_layernorm and gelu_layernorm of the same tensors.
struct Wide {
    std::int64_t N, H, W, C;
    int K;
    Buffer x = numbers(N * H * W * C), dy = numbers(N * H * W * C);
    Buffer conv = numbers(C * K * K), vector = numbers(C);

    Buffer run(int threads, bool norm_first) const {
        set_num_threads(threads);
        const std::int64_t pixels = N * H * W;
        Buffer y(pixels * C), kept(pixels * C), mean(pixels), rstd(pixels), dx(pixels * C);
        Buffer dconv(C * K * K), dbias(C), dgamma(C), dbeta(C), all;
        const auto take = [&](std::initializer_list<const Buffer*> parts) {
            const Buffer more = joined(parts);
            all.insert(all.end(), more.begin(), more.end());
        };

        NestedConvFwdParams f{};
        f.h = x.data(), f.conv_weight = conv.data(), f.conv_bias = vector.data();
        f.ln_weight = f.ln_bias = vector.data(), f.v = y.data(), f.u = kept.data();
        f.mean = mean.data(), f.rstd = rstd.data(), f.N = N, f.H = H, f.W = W, f.C = C, f.K = K;
        f.eps = 1e-6, f.shortcut = norm_first;
        CONVNEST_ISA::nested_conv_forward(f);
        NestedConvBwdParams b{};
        b.dv = dy.data(), b.h = f.h, b.u = f.u, b.mean = f.mean, b.rstd = f.rstd;
        b.conv_weight = f.conv_weight, b.ln_weight = b.ln_bias = vector.data();
        b.dh = dx.data(), b.dconv_weight = dconv.data(), b.dconv_bias = dbias.data();
        b.dln_weight = dgamma.data(), b.dln_bias = dbeta.data();
        b.N = N, b.H = H, b.W = W, b.C = C, b.K = K, b.shortcut = norm_first;
        CONVNEST_ISA::nested_conv_backward(b);
        take({&y, &kept, &dx, &dconv, &dbias, &dgamma, &dbeta});

        DwconvGeluLayernormFwdParams df{};
        df.x = x.data(), df.conv_weight = conv.data(), df.ln_weight = vector.data();
        df.y = y.data(), df.c = kept.data(), df.mean = mean.data(), df.rstd = rstd.data();
        df.N = N, df.H = H, df.W = W, df.C = C, df.K = K, df.eps = 1e-6;
        df.gelu = true, df.norm_first = norm_first;
        CONVNEST_ISA::dwconv_gelu_layernorm_forward(df);
        DwconvGeluLayernormBwdParams db{};
        db.dy = dy.data(), db.x = df.x, db.c = df.c, db.mean = df.mean, db.rstd = df.rstd;
        db.conv_weight = df.conv_weight, db.ln_weight = df.ln_weight, db.dx = dx.data();
        db.dconv_weight = dconv.data(), db.dconv_bias = dbias.data();
        db.dln_weight = dgamma.data(), db.dln_bias = dbeta.data();
        db.N = N, db.H = H, db.W = W, db.C = C, db.K = K, db.gelu = true;
        db.norm_first = norm_first;
        CONVNEST_ISA::dwconv_gelu_layernorm_backward(db);
        take({&y, &kept, &dx, &dconv, &dbias, &dgamma, &dbeta});

        GeluLayernormFwdParams gf{};
        gf.x = x.data(), gf.y = y.data(), gf.mean = mean.data(), gf.rstd = rstd.data();
        gf.rows = pixels, gf.C = C, gf.eps = 1e-6, gf.norm_first = norm_first;
        CONVNEST_ISA::gelu_layernorm_forward(gf);
        GeluLayernormBwdParams gb{};
        gb.dy = dy.data(), gb.x = gf.x, gb.mean = gf.mean, gb.rstd = gf.rstd, gb.dx = dx.data();
        gb.dln_weight = dgamma.data(), gb.dln_bias = dbeta.data();
        gb.rows = pixels, gb.C = C, gb.norm_first = norm_first;
        CONVNEST_ISA::gelu_layernorm_backward(gb);
        take({&y, &dx, &dgamma, &dbeta});
        return all;
    }
};

bool same(const Buffer& got, const Buffer& expected) {
    return std::memcmp(got.data(), expected.data(), got.size() * sizeof(float)) == 0;
}

}  // namespace

int main() {
    bool all_same = true;
    // In bands of rows, too short to share those about their edges and not; in slices of channels,
    // of four images and of three.
    for (const Block& block :
         {Block{3, 16, 9, 5, 33, 7}, Block{1, 30, 6, 4, 20, 3}, Block{7, 7, 7, 5, 870, 7}}) {
        const Buffer expected = block.run(1, 2);
        for (int kept = 0; kept <= 2; ++kept) {
            for (int repeat = 0; repeat < 3; ++repeat) {
                all_same = all_same && same(block.run(4, kept), expected);
            }
        }
    }
    // In bands of rows, and whole maps.
    for (const Wide& wide : {Wide{1, 30, 6, 20, 3}, Wide{2, 17, 9, 33, 7}, Wide{5, 7, 7, 50, 7}}) {
        for (const bool norm_first : {false, true}) {
            const Buffer expected = wide.run(1, norm_first);
            for (int repeat = 0; repeat < 3; ++repeat) {
                all_same = all_same && same(wide.run(4, norm_first), expected);
            }
        }
    }
    std::puts(all_same ? "same bits" : "other bits");
    return all_same ? 0 : 1;
}
