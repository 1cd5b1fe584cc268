// Weight and bias gradients of a depthwise K×K convolution on the FMA units, in float:
//
//     dw[c, ky, kx] = Σ z[n, y + ky − R, x + kx − R, c] · dy[n, y, x, c],    db[c] = Σ dy
//     z = x, or with gelu_norm (GELU(x) − mean)·rstd·γ + β; 0 outside the image
//
// Work maps to blocks as fma_tiles.cuh says, 2 rows of dy to a stage; z's rows are a ring of
// K + 3 in shared memory: K + 1 that the stage reads, and 2 that arrive meanwhile, as in
// depthwise_fma.cuh, the prologue once per element up to the halo. A thread keeps the taps' sums of
// its channel in registers over all items of its block, and takes dy, 2 rows of 7 outputs and the
// next stage's 2, straight from memory: nobody else needs them. K >= 11: the kernel rows are shared
// between two warps.
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
constexpr int kWgradRows = 2;  // of dy in a stage

template <int K>
struct DepthwiseFmaWgradShared {
    static constexpr int kPositions = kWgradStrips<K> * (kStrip + K / 2) + K / 2;
    static constexpr int kRing = K - 1 + 2 * kWgradRows;
    union {
        float z[kRing][kPositions][kFmaChannels];
        float sums[K * K][kFmaChannels + 1];  // at the end
    };
    float bias[kWgradStrips<K>][kFmaChannels];
    FmaStatistics<kWgradRows, kPositions> statistics;
    std::uint32_t source[kPositions];
    FmaAffine affine;
};
static_assert(sizeof(DepthwiseFmaWgradShared<13>) <= 99 * 1024);
// Four blocks, and 1 KB of the system's for each, share the 228 KB of sm_90, and two sm_80's 164.
static_assert(4 * (sizeof(DepthwiseFmaWgradShared<7>) + 1024) <= 228 * 1024);
static_assert(2 * (sizeof(DepthwiseFmaWgradShared<11>) + 1024) <= 164 * 1024);

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
    // This thread's strip and kernel rows; two warps' shares may overlap by a row.
    const int strips = tiles.per_image * tiles.beside;
    const int share = warp / strips, block_strip = warp - share * strips;
    const int tap_row = share == 0 ? 0 : K - kRows;
    // Its image, and the strip of that, in one register
    const int place = block_strip / tiles.per_image << 8 | block_strip % tiles.per_image;

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
        for (int i = thread; i < positions; i += blockDim.x) {
            store_shared(&shared.source[i], fma_source(tiles, item, i, R));
        }
        // Whose second effect: the rows of the item before have been read.
        __syncthreads();
        // f(position, channel, source) for the vectors of a row that this thread fetches and fills,
        // what its place says being computed anew.
        const auto each = [&](int row, const auto& f) {
            const int filler = recompute_from(threadIdx.x);
            const int end = recompute_from(tiles.beside) * pitch + R;
            const bool inside = row >= 0 && row < tiles.height;
#pragma unroll 1
            for (int i = filler / kVectors; i < end; i += blockDim.x / kVectors) {
                const auto source = load_shared<std::uint32_t>(&shared.source[i]);
                f(i, filler % kVectors * Vector::kCount, inside ? source : kNothing);
            }
        };
        const auto first_pixel = [&](int row) {
            return static_cast<std::uint32_t>(recompute_from(item.image) * tiles.height + row) *
                   tiles.width;
        };
        const auto pixel_of = [&](std::uint32_t source, int row) {
            return first_pixel(row) + (source >> 1);
        };
        const auto at = [&](std::uint32_t source, int row, int to) {
            return static_cast<std::size_t>(pixel_of(source, row)) * args.C + channel0 + to;
        };
        const auto wrap = [](int slot) { return slot < kRing ? slot : slot - kRing; };
        // The stage's rows from `row` on, to the slots from `slot` on
        const auto fetch = [&](int slot, int row) {
#pragma unroll 1
            for (int r = 0; r < kWgradRows; ++r) {
                each(row + r, [&](int i, int to, std::uint32_t source) {
                    if (source == kNothing) return;
                    if (args.gelu_norm && to == 0) {
                        const std::uint32_t pixel = pixel_of(source, row + r);
                        shared.statistics.fetch(r, i, args.mean + pixel, args.rstd + pixel);
                    }
                    if (args.vector && channel0 + to < args.C) {
                        async_copy16(&shared.z[wrap(slot + r)][i][to],
                                     static_cast<const Storage*>(args.x) + at(source, row + r, to));
                    }
                });
            }
            async_copy_commit();
        };
        const auto fill = [&](int slot, int row) {
            async_copy_wait<0>();
            // A position's statistics are fetched by one of its threads, of a warp.
            if (args.gelu_norm) __syncwarp();
#pragma unroll 1
            for (int r = 0; r < kWgradRows; ++r) {
                each(row + r, [&](int i, int to, std::uint32_t source) {
                    float* cell = &shared.z[wrap(slot + r)][i][to];
                    const int channels = args.C - channel0 - to;
                    Vector z{}, g;
                    if (source != kNothing && channels > 0) {
                        z.take(cell, static_cast<const Storage*>(args.x) + at(source, row + r, to),
                               channels, args.vector);
                        if (args.gelu_norm) {
                            shared.affine.gelu_norm(
                                z, g, load_shared<float>(&shared.statistics.mean[r][i]),
                                load_shared<float>(&shared.statistics.rstd[r][i]), to);
                        }
                    }
                    z.store_shared_row(cell);
                });
            }
        };
        const auto load_dy = [&](float (&dy)[kWgradRows][kStrip], int row) {
            const int here = recompute_from(place), image = here >> 8;
            const int channel = channel0 + recompute_from(threadIdx.x) % kWarpSize;
            const int x0 = item.x + (here & 255) * kStrip;
            const bool reads = channel < args.C && item.image + image < tiles.images;
#pragma unroll
            for (int r = 0; r < kWgradRows; ++r) {
                const std::uint32_t pixel = first_pixel(image * tiles.height + row + r) + x0;
                const auto* from = static_cast<const Storage*>(args.dy) +
                                   static_cast<std::size_t>(pixel) * args.C + channel;
#pragma unroll
                for (int x = 0; x < kStrip; ++x, from += args.C) {
                    dy[r][x] = reads && x < tiles.width - x0 && row + r < item.end
                                   ? Element::widen_one(load_global(from))
                                   : 0.f;
                }
            }
        };
        for (int i = 0; i < K - 1; i += kWgradRows) {
            fetch(i, item.first - R + i);
            fill(i, item.first - R + i);
            if (args.gelu_norm) __syncwarp();  // the statistics have been read
        }
        fetch(K - 1, item.first + R);
        float dy[kWgradRows][kStrip], next_dy[kWgradRows][kStrip];
        load_dy(next_dy, item.first);
        int oldest = 0;  // slot of row `stage − R`
#pragma unroll 1
        for (int stage = item.first; stage < item.end; stage += kWgradRows) {
            fill(wrap(oldest + K - 1), stage + R);
#pragma unroll
            for (int r = 0; r < kWgradRows; ++r) {
#pragma unroll
                for (int x = 0; x < kStrip; ++x) {
                    dy[r][x] = next_dy[r][x];
                    bias_sum += dy[r][x];
                }
            }
            __syncthreads();
            // Its slots' rows have been read by the stage before.
            if (stage + kWgradRows < item.end) {
                fetch(wrap(oldest + K - 1 + kWgradRows), stage + kWgradRows + R);
                load_dy(next_dy, stage + kWgradRows);
            }
            const int here = recompute_from(place);
            const int base = (here >> 8) * pitch + (here & 255) * kStrip;
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
    if (thread < kFmaChannels && channel0 + thread < args.C) {
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
