// Weight and bias gradients of a depthwise K×K convolution on the FMA units, in float:
//
//     dw[c, ky, kx] = Σ z[n, y + ky − R, x + kx − R, c] · dy[n, y, x, c],    db[c] = Σ dy
//     z = x, or with gelu_norm (GELU(x) − mean)·rstd·γ + β; 0 outside the image
//
// Work maps to blocks as fma_tiles.cuh says, 4 rows of dy to a stage; z's rows are a ring of
// K + 3 in shared memory, filled by 16-byte loads, the prologue once per element up to the halo. A
// thread keeps the taps' sums of its channel in registers over all items of its block, and takes
// dy, 4 rows of 7 outputs, straight from memory: nobody else needs them. K >= 11: the kernel rows
// are shared between two warps.
//
// Reads x, dy, mean, rstd; writes partial sums: dw [groups, C, K·K] and db [groups, C], for
// sum_partials(). The number of groups is a function of the shape alone.
#pragma once

#include "common/depthwise_fma.cuh"

namespace convnest::cuda {

struct DepthwiseFmaWgradArgs {
    bool gelu_norm;
    const void* x;           // [N, H, W, C]
    const void* dy;          // [N, H, W, C]
    const float* mean;       // [N, H, W]; gelu_norm only, as the three below
    const float* rstd;       // [N, H, W]
    const float* ln_weight;  // [C] or null
    const float* ln_bias;    // [C] or null
    float* dweight;          // [groups, C, K·K]
    float* dbias;            // [groups, C]
    bool vector;             // as in DepthwiseFmaArgs
    int C;
    FmaTiles tiles;
    int channel_blocks;
    int groups;
};

template <int K>
constexpr int kWgradStrips = K <= 9 ? 4 : 3;  // what 99 KB of shared memory hold
template <int K>
constexpr int kTapShares = K <= 9 ? 1 : 2;  // warps that share the kernel rows of a strip
template <int K>
constexpr int kTapRows = (K + kTapShares<K> - 1) / kTapShares<K>;
constexpr int kWgradRows = 4;  // of dy in a stage

template <int K>
struct DepthwiseFmaWgradShared {
    static constexpr int kPositions = kWgradStrips<K> * (kStrip + K / 2) + K / 2;
    static constexpr int kRing = K - 1 + kWgradRows;
    union {
        float z[kRing][kPositions][kFmaChannels];
        float sums[K * K][kFmaChannels + 1];  // at the end
    };
    float bias[kWgradStrips<K>][kFmaChannels];
    std::uint32_t source[kPositions];
    FmaAffine affine;
};
static_assert(sizeof(DepthwiseFmaWgradShared<13>) <= 99 * 1024);

template <class Element, int K>
__global__ void __launch_bounds__(kWgradStrips<K>* kTapShares<K>* kWarpSize, K <= 7 ? 4 : 2)
    depthwise_fma_wgrad_kernel(DepthwiseFmaWgradArgs args) {
    using Shared = DepthwiseFmaWgradShared<K>;
    CONVNEST_SHARED_MEMORY(Shared, shared);
    using Storage = typename Element::Storage;
    using Vector = Channels<Element>;
    constexpr int R = K / 2, kRing = Shared::kRing, kRows = kTapRows<K>;
    constexpr int kVectors = kFmaChannels / Vector::kCount;
    const FmaTiles& tiles = args.tiles;
    const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
    const int channel0 = blockIdx.x % args.channel_blocks * kFmaChannels;
    const int group = blockIdx.x / args.channel_blocks;
    const int pitch = tiles.per_image * kStrip + R, positions = tiles.beside * pitch + R;
    const int channel = channel0 + lane;
    // This thread's strip and kernel rows; two warps' shares may overlap by a row.
    const int strips = tiles.per_image * tiles.beside;
    const int share = warp / strips, block_strip = warp - share * strips;
    const int tap_row = share == 0 ? 0 : K - kRows;
    const int image = block_strip / tiles.per_image;
    const int strip = block_strip - image * tiles.per_image;
    const int base = image * pitch + strip * kStrip;
    const int fill_channel = thread % kVectors * Vector::kCount;
    const int fill_channels = args.C - channel0 - fill_channel;

    shared.affine.fill(args.ln_weight, args.ln_bias, channel0, args.C, thread);
    float sums[kRows][K], bias_sum = 0.f;
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
#pragma unroll
        for (int kx = 0; kx < K; ++kx) sums[k][kx] = 0.f;
    }

#pragma unroll 1
    for (int index = group; index < tiles.items; index += args.groups) {
        const FmaItem item(tiles, index);
        const std::uint32_t row0 =
            static_cast<std::uint32_t>(item.image) * tiles.height * tiles.width;
        for (int i = thread; i < positions; i += blockDim.x) {
            store_shared(&shared.source[i], fma_source(tiles, item, i, R));
        }
        // Whose second effect: the rows of the item before have been read.
        __syncthreads();
        const auto fill = [&](int slot, int row) {
            const bool inside = row >= 0 && row < tiles.height;
            for (int i = thread / kVectors; i < positions; i += blockDim.x / kVectors) {
                const auto source = load_shared<std::uint32_t>(&shared.source[i]);
                Vector z{}, g;
                if (inside && source != kNothing && fill_channels > 0) {
                    const std::uint32_t pixel = row0 + row * tiles.width + (source >> 1);
                    const std::size_t at =
                        static_cast<std::size_t>(pixel) * args.C + channel0 + fill_channel;
                    z.load(static_cast<const Storage*>(args.x) + at, fill_channels, args.vector);
                    if (args.gelu_norm) {
                        shared.affine.gelu_norm(z, g, load_global(args.mean + pixel),
                                                load_global(args.rstd + pixel), fill_channel);
                    }
                }
                z.store_shared_row(&shared.z[slot][i][fill_channel]);
            }
        };
        const auto wrap = [](int slot) { return slot < kRing ? slot : slot - kRing; };
        for (int i = 0; i < K - 1; ++i) fill(i, item.first - R + i);
        const bool reads = channel < args.C && item.image + image < tiles.images;
        const int outputs = tiles.width - item.x - strip * kStrip;
        int oldest = 0;  // slot of row `stage − R`
#pragma unroll 1
        for (int stage = item.first; stage < item.end; stage += kWgradRows) {
            if (stage > item.first) __syncthreads();  // the ring's oldest rows have been read
            for (int r = 0; r < kWgradRows; ++r) {
                fill(wrap(oldest + K - 1 + r), stage + R + r);
            }
            float dy[kWgradRows][kStrip];
#pragma unroll
            for (int r = 0; r < kWgradRows; ++r) {
                const std::uint32_t pixel = row0 +
                                            (image * tiles.height + stage + r) * tiles.width +
                                            item.x + strip * kStrip;
                const auto* from = static_cast<const Storage*>(args.dy) +
                                   static_cast<std::size_t>(pixel) * args.C + channel;
#pragma unroll
                for (int x = 0; x < kStrip; ++x, from += args.C) {
                    dy[r][x] = reads && x < outputs && stage + r < item.end
                                   ? Element::widen_one(load_global(from))
                                   : 0.f;
                    bias_sum += dy[r][x];
                }
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < kRows + kWgradRows - 1; ++i) {
                const int slot = wrap(oldest + tap_row + i);
                float in[kStrip + K - 1];
#pragma unroll
                for (int x = 0; x < kStrip + K - 1; ++x) {
                    in[x] = load_shared<float>(&shared.z[slot][base + x][lane]);
                }
#pragma unroll
                for (int r = 0; r < kWgradRows; ++r) {
                    if (i - r < 0 || i - r >= kRows) continue;
#pragma unroll
                    for (int kx = 0; kx < K; ++kx) {
                        float& sum = sums[i - r >= 0 && i - r < kRows ? i - r : 0][kx];
#pragma unroll
                        for (int x = 0; x < kStrip; ++x) sum = fmaf(in[x + kx], dy[r][x], sum);
                    }
                }
            }
            oldest = wrap(oldest + kWgradRows);
        }
    }

    // The strips' sums, one after the other
    if (share == 0) store_shared(&shared.bias[block_strip][lane], bias_sum);
    for (int turn = 0; turn < strips; ++turn) {
        __syncthreads();
        if (block_strip != turn) continue;
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
            if (share > 0 && tap_row + k < kRows) continue;
#pragma unroll
            for (int kx = 0; kx < K; ++kx) {
                float* sum = &shared.sums[(tap_row + k) * K + kx][lane];
                store_shared(sum, turn == 0 ? sums[k][kx] : load_shared<float>(sum) + sums[k][kx]);
            }
        }
    }
    __syncthreads();
    const std::size_t first = static_cast<std::size_t>(group) * args.C + channel0;
    for (int i = thread; i < kFmaChannels * K * K; i += blockDim.x) {
        const int c = i / (K * K), tap = i - c * K * K;
        if (channel0 + c >= args.C) break;
        store_global(args.dweight + first * K * K + i, load_shared<float>(&shared.sums[tap][c]));
    }
    if (thread < kFmaChannels && channel < args.C) {
        float sum = 0.f;
        for (int s = 0; s < strips; ++s) sum += load_shared<float>(&shared.bias[s][thread]);
        store_global(args.dbias + first + thread, sum);
    }
}

struct FmaWgradPlan {
    FmaTiles tiles;
    int groups;
};

// Four blocks of at most 192 threads for each SM of the largest GPUs.
inline FmaWgradPlan plan_fma_wgrad(int N, int H, int W, int C, int kernel_size) {
    const int groups = ceil_div(2 * kPersistentBlocks, ceil_div(C, kFmaChannels));
    FmaWgradPlan plan{plan_fma_tiles(N, H, W, kernel_size <= 9 ? 4 : 3, groups * kItemsPerBlock),
                      groups};
    if (plan.tiles.items < groups) plan.groups = plan.tiles.items;
    return plan;
}

void launch_depthwise_fma_wgrad(const char* name, DepthwiseFmaWgradArgs args,
                                const FmaWgradPlan& plan, int kernel_size, ElementType type,
                                void* stream);

}  // namespace convnest::cuda
