// A depthwise K×K convolution on the FMA units: float32, and the kernel sizes that the tensor
// cores' band does not fit. In float, whatever the activations' type.
//
//     FmaSource::tensor         y = DW(x) [+ bias], or DWᵀ(x) with `flipped` weights
//     FmaSource::gelu_norm      g = GELU(x);  u = [g +] DW((g − mean)·rstd·γ + β) + bias;
//                               y = GELU(u), and u is kept
//     FmaSource::gelu_gradient  du = x ⊙ GELU'(u);  y = DWᵀ(du), and du is kept
//
// Work maps to blocks as fma_tiles.cuh says. A block marches down the rows of its item:
//     fill     the prologue once per element up to the halo; a row arrives as it is in memory, and
//              becomes floats where it lies, by the threads that have asked for it
//     barrier
//     fetch    the next row, asynchronously, into the other of two places: its latency hides behind
//              what follows
//     product  a thread reads the K + 6 neighbours of its 7 outputs, and adds what they give to K
//              rows of sums: 7·K·K FMAs. The ring of sums turns without a move, as the tensor
//              cores' does: sum k starts from sum k + 1.
// A finished row goes from registers to memory, 32 channels of a pixel at a time. K <= 9: the taps
// stay in registers.
#pragma once

#include "common/element_type.h"
#include "common/fma_tiles.cuh"

namespace convnest::cuda {

enum class FmaSource { tensor, gelu_norm, gelu_gradient };

constexpr int kFmaWarps = 8;
constexpr int kFmaSlots = 2;  // rows in shared memory: one is read while the next arrives

struct DepthwiseFmaArgs {
    FmaSource source;
    const void* x;           // [N, H, W, C]; of gelu_norm h, of gelu_gradient dv
    const void* u;           // [N, H, W, C]; gelu_gradient only
    void* y;                 // [N, H, W, C]
    void* kept;              // [N, H, W, C]: u (or null) of gelu_norm, du of gelu_gradient
    const float* mean;       // [N, H, W]; gelu_norm only, as the three below
    const float* rstd;       // [N, H, W]
    const float* ln_weight;  // [C] or null
    const float* ln_bias;    // [C] or null
    const float* weight;     // [C, K·K]
    const float* bias;       // [C] or null
    bool flipped, shortcut;
    bool vector;  // C is a multiple of the elements in 16 bytes, and tensors are 16-byte aligned
    int C;
    FmaTiles tiles;
    int channel_blocks;
    int groups;  // of items: a block takes every groups-th
};

// The taps, and the statistics of the rows on their way: in their place once registers hold them.
template <int K, class Statistics, bool kHeld>
union FmaTaps {
    float taps[K * K][kFmaChannels + 1];
    Statistics statistics;
};

template <int K, class Statistics>
union FmaTaps<K, Statistics, false> {
    struct {
        float taps[K * K][kFmaChannels + 1];
        Statistics statistics;
    };
};

template <int K>
struct DepthwiseFmaShared {
    static constexpr bool kHeld = K <= 9;  // taps in registers
    static constexpr int kPositions = kFmaWarps * (kStrip + K / 2) + K / 2;
    float z[kFmaSlots][kPositions][kFmaChannels];
    float g[kFmaSlots][kPositions][kFmaChannels];  // of gelu_gradient: u, on its way
    FmaTaps<K, FmaStatistics<kFmaSlots, kPositions>, kHeld> parameters;
    std::uint32_t source[kPositions];
    FmaAffine affine;
    float bias[kFmaChannels];
    int image, x, first, end;  // of the item
};
static_assert(sizeof(DepthwiseFmaShared<13>) <= 99 * 1024);
// Two blocks, and 1 KB of the system's for each, share the 100 KB of sm_86, sm_89 and sm_120.
static_assert(2 * (sizeof(DepthwiseFmaShared<7>) + 1024) <= 100 * 1024);

template <class Element, int K>
__global__ void __launch_bounds__(kFmaWarps* kWarpSize, K <= 7 ? 2 : 1)
    depthwise_fma_kernel(DepthwiseFmaArgs args) {
    CONVNEST_SHARED_MEMORY(DepthwiseFmaShared<K>, shared);
    using Storage = typename Element::Storage;
    using Vector = Channels<Element>;
    constexpr int R = K / 2;
    constexpr bool kHeld = DepthwiseFmaShared<K>::kHeld;
    constexpr int kVectors = kFmaChannels / Vector::kCount;
    const FmaTiles& tiles = args.tiles;
    const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
    const int channel0 = blockIdx.x % args.channel_blocks * kFmaChannels;
    const int group = blockIdx.x / args.channel_blocks;
    const int positions = tiles.beside * (tiles.per_image * kStrip + R) + R;

    // Parameters
    for (int i = thread; i < kFmaChannels * K * K; i += blockDim.x) {
        const int channel = i / (K * K), tap = i - channel * K * K;
        const float w =
            channel0 + channel < args.C ? load_global(args.weight + channel0 * K * K + i) : 0.f;
        store_shared(&shared.parameters.taps[args.flipped ? K * K - 1 - tap : tap][channel], w);
    }
    shared.affine.fill(args.ln_weight, args.ln_bias, channel0, args.C, thread);
    if (thread < kFmaChannels) {
        const bool exists = args.bias != nullptr && channel0 + thread < args.C;
        store_shared(&shared.bias[thread],
                     exists ? load_global(args.bias + channel0 + thread) : 0.f);
    }
    float held[kHeld ? K * K : 1];
    if constexpr (kHeld) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < K * K; ++i)
            held[i] = load_shared<float>(&shared.parameters.taps[i][lane]);
    }
    // This thread's image, and its strip of that, in one register
    const int place = warp / tiles.per_image << 8 | warp % tiles.per_image;

#pragma unroll 1
    for (int index = group; index < tiles.items; index += args.groups) {
        const FmaItem item(tiles, index);
        if (index >= args.groups) __syncthreads();  // the item before is done with
        if (thread == 0) {
            store_shared(&shared.image, item.image);
            store_shared(&shared.x, item.x);
            store_shared(&shared.first, item.first);
            store_shared(&shared.end, item.end);
        }
        for (int i = thread; i < positions; i += blockDim.x) {
            store_shared(&shared.source[i], fma_source(tiles, item, i, R));
        }
        __syncthreads();
        // f(position, channel, source) for the vectors of a row that this thread fetches and fills.
        // Registers are short beside GELU: what a thread's place says is computed anew.
        const auto each = [&](const auto& f) {
            const int filler = recompute_from(threadIdx.x);
            const int end = positions;
#pragma unroll 1
            for (int i = filler / kVectors; i < end; i += blockDim.x / kVectors) {
                f(i, filler % kVectors * Vector::kCount,
                  load_shared<std::uint32_t>(&shared.source[i]));
            }
        };
        const auto first_pixel = [&](int row) {
            return static_cast<std::uint32_t>(load_shared<int>(&shared.image) * tiles.height +
                                              row) *
                   tiles.width;
        };
        const auto pixel_of = [&](std::uint32_t source, int row) {
            return first_pixel(row) + (source >> 1);
        };
        const auto at = [&](std::uint32_t source, int row, int to) {
            return static_cast<std::size_t>(pixel_of(source, row)) * args.C + channel0 + to;
        };
        // A row's slot is its parity.
        const auto fetch = [&](int row) {
            const int slot = row & 1;
            each([&](int i, int to, std::uint32_t source) {
                if (source == kNothing) return;
                if (args.source == FmaSource::gelu_norm && to == 0) {
                    const std::uint32_t pixel = pixel_of(source, row);
                    shared.parameters.statistics.fetch(slot, i, args.mean + pixel,
                                                       args.rstd + pixel);
                }
                if (!args.vector || channel0 + to >= args.C) return;
                async_copy16(&shared.z[slot][i][to],
                             static_cast<const Storage*>(args.x) + at(source, row, to));
                if (args.source == FmaSource::gelu_gradient) {
                    async_copy16(&shared.g[slot][i][to],
                                 static_cast<const Storage*>(args.u) + at(source, row, to));
                }
            });
            async_copy_commit();
        };
        const auto fill = [&](int row) {
            const int slot = row & 1;
            async_copy_wait<0>();
            // A position's statistics are fetched by one of its threads, of a warp.
            if (args.source == FmaSource::gelu_norm) __syncwarp();
            each([&](int i, int to, std::uint32_t source) {
                float* cell = &shared.z[slot][i][to];
                const int channels = args.C - channel0 - to;
                Vector z{}, g{};
                if (source != kNothing && channels > 0) {
                    z.take(cell, static_cast<const Storage*>(args.x) + at(source, row, to),
                           channels, args.vector);
                    if (args.source == FmaSource::gelu_norm) {
                        const auto& statistics = shared.parameters.statistics;
                        shared.affine.gelu_norm(z, g, load_shared<float>(&statistics.mean[slot][i]),
                                                load_shared<float>(&statistics.rstd[slot][i]), to);
                    } else if (args.source == FmaSource::gelu_gradient) {
                        Vector u;
                        u.take(&shared.g[slot][i][to],
                               static_cast<const Storage*>(args.u) + at(source, row, to), channels,
                               args.vector);
#pragma unroll
                        for (int c = 0; c < Vector::kCount; ++c) {
                            z.value[c] *= gelu_slope_of<Element>(u.value[c]);
                        }
                        if ((source & 1) && row >= load_shared<int>(&shared.first) &&
                            row < load_shared<int>(&shared.end)) {
                            z.store(static_cast<Storage*>(args.kept) + at(source, row, to),
                                    channels, args.vector);
                        }
                    }
                }
                z.store_shared_row(cell);
                if (args.source == FmaSource::gelu_norm && args.shortcut) {
                    g.store_shared_row(&shared.g[slot][i][to]);
                }
            });
        };

        float sums[K][kStrip];
        const auto bias = load_shared<float>(&shared.bias[lane]);
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
            for (int x = 0; x < kStrip; ++x) sums[k][x] = bias;
        }
        const int start = item.first > R ? item.first - R : 0;
        fetch(start);
#pragma unroll 1
        for (int row_in = start; row_in < load_shared<int>(&shared.end) + R; ++row_in) {
            if (row_in < tiles.height) {
                fill(row_in);
                __syncthreads();
                if (row_in + 1 < tiles.height && row_in + 1 < load_shared<int>(&shared.end) + R) {
                    fetch(row_in + 1);
                }
                const int slot = row_in & 1;
                const int here = recompute_from(place);
                const int base =
                    (here >> 8) * (tiles.per_image * kStrip + R) + (here & 255) * kStrip;
                const auto bias =
                    load_shared<float>(&shared.bias[recompute_from(threadIdx.x) % kWarpSize]);
                float in[kStrip + K - 1];
#pragma unroll
                for (int i = 0; i < kStrip + K - 1; ++i) {
                    in[i] = load_shared<float>(&shared.z[slot][base + i][lane]);
                }
#pragma unroll
                for (int k = 0; k < K; ++k) {
#pragma unroll
                    for (int kx = 0; kx < K; ++kx) {
                        const int tap = (K - 1 - k) * K + kx;
                        const float w =
                            kHeld ? held[kHeld ? tap : 0]
                                  : load_shared<float>(&shared.parameters.taps[tap][lane]);
#pragma unroll
                        for (int x = 0; x < kStrip; ++x) {
                            float before = sums[k][x];
                            if (kx == 0) before = k + 1 < K ? sums[k + 1 < K ? k + 1 : 0][x] : bias;
                            sums[k][x] = fmaf(in[x + kx], w, before);
                        }
                    }
                }
                // The row itself is the centre of sum R.
                if (args.source == FmaSource::gelu_norm && args.shortcut) {
#pragma unroll
                    for (int x = 0; x < kStrip; ++x) {
                        sums[R][x] += load_shared<float>(&shared.g[slot][base + R + x][lane]);
                    }
                }
            } else {
                // Below the image: zeros
#pragma unroll
                for (int k = 0; k + 1 < K; ++k) {
#pragma unroll
                    for (int x = 0; x < kStrip; ++x) sums[k][x] = sums[k + 1][x];
                }
            }
            const int row = row_in - R;
            const int here = recompute_from(place), image = here >> 8;
            const int x0 = load_shared<int>(&shared.x) + (here & 255) * kStrip;
            const int channel = channel0 + recompute_from(threadIdx.x) % kWarpSize;
            if (row < load_shared<int>(&shared.first) || channel >= args.C ||
                load_shared<int>(&shared.image) + image >= tiles.images) {
                continue;
            }
            const std::uint32_t pixel = first_pixel(image * tiles.height + row) + x0;
            const int outputs = tiles.width - x0;
            std::size_t at = static_cast<std::size_t>(pixel) * args.C + channel;
#pragma unroll
            for (int x = 0; x < kStrip; ++x, at += args.C) {
                if (x >= outputs) break;
                float value = sums[0][x];
                if (args.source == FmaSource::gelu_norm) {
                    if (args.kept != nullptr) {
                        store_global(static_cast<Storage*>(args.kept) + at,
                                     Element::round_one(value));
                    }
                    value = gelu_of<Element>(value);
                }
                store_global(static_cast<Storage*>(args.y) + at, Element::round_one(value));
            }
        }
    }
}

// Plans the tiles, and launches; the instances are in depthwise_fma.cu.
void launch_depthwise_fma(const char* name, DepthwiseFmaArgs args, int N, int H, int W,
                          int kernel_size, ElementType type, void* stream);

}  // namespace convnest::cuda
