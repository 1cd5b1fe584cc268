// A depthwise K×K convolution on the FMA units: float32, and the kernel sizes that the tensor
// cores' band does not fit. In float, whatever the activations' type.
//
//     FmaSource::tensor         y = DW(x) [+ bias], or DWᵀ(x) with `flipped` weights
//     FmaSource::gelu_norm      g = GELU(x);  u = [g +] DW((g − mean)·rstd·γ + β) + bias;
//                               y = GELU(u), and u is kept
//     FmaSource::gelu_gradient  du = x ⊙ GELU'(u);  y = DWᵀ(du), and du is kept
//
// Work maps to blocks as fma_tiles.cuh says. A block marches down the rows of its item, 2 to a
// stage:
//     fill     16-byte loads, the prologue once per element up to the halo, floats to shared memory
//     barrier
//     product  a thread reads the K + 6 neighbours of its 7 outputs, and adds what they give to K
//              rows of sums: 7·K·K FMAs. The ring of sums turns without a move, as the tensor
//              cores' does: sum k starts from sum k + 1.
//     barrier
// A finished row goes from registers to memory, 32 channels of a pixel at a time. K <= 9: the taps
// stay in registers.
#pragma once

#include "common/element_type.h"
#include "common/fma_tiles.cuh"

namespace convnest::cuda {

enum class FmaSource { tensor, gelu_norm, gelu_gradient };

constexpr int kFmaWarps = 8;
constexpr int kFmaStageRows = 2;

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

template <int K>
struct DepthwiseFmaShared {
    static constexpr int kPositions = kFmaWarps * (kStrip + K / 2) + K / 2;
    float z[kFmaStageRows][kPositions][kFmaChannels];
    float g[kFmaStageRows][kPositions][kFmaChannels];
    float taps[K * K][kFmaChannels + 1];
    std::uint32_t source[kPositions];
    FmaAffine affine;
};
static_assert(sizeof(DepthwiseFmaShared<13>) <= 99 * 1024);

template <class Element, int K>
__global__ void __launch_bounds__(kFmaWarps* kWarpSize, K <= 7 ? 2 : 1)
    depthwise_fma_kernel(DepthwiseFmaArgs args) {
    CONVNEST_SHARED_MEMORY(DepthwiseFmaShared<K>, shared);
    using Storage = typename Element::Storage;
    using Vector = Channels<Element>;
    constexpr int R = K / 2;
    constexpr bool kHeld = K <= 9;  // taps in registers
    constexpr int kVectors = kFmaChannels / Vector::kCount;
    const FmaTiles& tiles = args.tiles;
    const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
    const int channel0 = blockIdx.x % args.channel_blocks * kFmaChannels;
    const int group = blockIdx.x / args.channel_blocks;
    const int pitch = tiles.per_image * kStrip + R, positions = tiles.beside * pitch + R;

    // Parameters
    for (int i = thread; i < kFmaChannels * K * K; i += blockDim.x) {
        const int channel = i / (K * K), tap = i - channel * K * K;
        const float w =
            channel0 + channel < args.C ? load_global(args.weight + channel0 * K * K + i) : 0.f;
        store_shared(&shared.taps[args.flipped ? K * K - 1 - tap : tap][channel], w);
    }
    shared.affine.fill(args.ln_weight, args.ln_bias, channel0, args.C, thread);
    float held[kHeld ? K * K : 1];
    if constexpr (kHeld) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < K * K; ++i) held[i] = load_shared<float>(&shared.taps[i][lane]);
    }
    const float bias = args.bias != nullptr && channel0 + lane < args.C
                           ? load_global(args.bias + channel0 + lane)
                           : 0.f;
    // This thread's strip
    const int image = warp / tiles.per_image, strip = warp - image * tiles.per_image;
    const int base = image * pitch + strip * kStrip;

#pragma unroll 1
    for (int index = group; index < tiles.items; index += args.groups) {
        const FmaItem item(tiles, index);
        const std::uint32_t row0 =
            static_cast<std::uint32_t>(item.image) * tiles.height * tiles.width;
        for (int i = thread; i < positions; i += blockDim.x) {
            store_shared(&shared.source[i], fma_source(tiles, item, i, R));
        }
        // Registers are short beside GELU: what a thread fills and stores is computed anew.
        const auto fill = [&](int r, int row) {
            const int filler = recompute_from(thread);
            const int fill_channel = filler % kVectors * Vector::kCount;
            const int fill_channels = args.C - channel0 - fill_channel;
            for (int i = filler / kVectors; i < positions; i += blockDim.x / kVectors) {
                const auto source = load_shared<std::uint32_t>(&shared.source[i]);
                Vector z{}, g{};
                if (source != kNothing && fill_channels > 0) {
                    const std::uint32_t pixel = row0 + row * tiles.width + (source >> 1);
                    const std::size_t at =
                        static_cast<std::size_t>(pixel) * args.C + channel0 + fill_channel;
                    z.load(static_cast<const Storage*>(args.x) + at, fill_channels, args.vector);
                    if (args.source == FmaSource::gelu_norm) {
                        shared.affine.gelu_norm(z, g, load_global(args.mean + pixel),
                                                load_global(args.rstd + pixel), fill_channel);
                    } else if (args.source == FmaSource::gelu_gradient) {
                        Vector u;
                        u.load(static_cast<const Storage*>(args.u) + at, fill_channels,
                               args.vector);
#pragma unroll
                        for (int c = 0; c < Vector::kCount; ++c) {
                            z.value[c] *= gelu_slope_of<Element>(u.value[c]);
                        }
                        if ((source & 1) && row >= item.first && row < item.end) {
                            z.store(static_cast<Storage*>(args.kept) + at, fill_channels,
                                    args.vector);
                        }
                    }
                }
                z.store_shared_row(&shared.z[r][i][fill_channel]);
                if (args.source == FmaSource::gelu_norm && args.shortcut) {
                    g.store_shared_row(&shared.g[r][i][fill_channel]);
                }
            }
        };

        float sums[K][kStrip];
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
            for (int x = 0; x < kStrip; ++x) sums[k][x] = bias;
        }
        const int start = item.first > R ? item.first - R : 0;
#pragma unroll 1
        for (int stage = start; stage < item.end + R; stage += kFmaStageRows) {
            __syncthreads();  // the rows before have been read
            for (int r = 0; r < kFmaStageRows; ++r) {
                if (stage + r < tiles.height) fill(r, stage + r);
            }
            __syncthreads();
#pragma unroll 1
            for (int r = 0; r < kFmaStageRows && stage + r < item.end + R; ++r) {
                if (stage + r < tiles.height) {
                    float in[kStrip + K - 1];
#pragma unroll
                    for (int i = 0; i < kStrip + K - 1; ++i) {
                        in[i] = load_shared<float>(&shared.z[r][base + i][lane]);
                    }
#pragma unroll
                    for (int k = 0; k < K; ++k) {
#pragma unroll
                        for (int kx = 0; kx < K; ++kx) {
                            const int tap = (K - 1 - k) * K + kx;
                            const float w = kHeld ? held[kHeld ? tap : 0]
                                                  : load_shared<float>(&shared.taps[tap][lane]);
#pragma unroll
                            for (int x = 0; x < kStrip; ++x) {
                                float before = sums[k][x];
                                if (kx == 0)
                                    before = k + 1 < K ? sums[k + 1 < K ? k + 1 : 0][x] : bias;
                                sums[k][x] = fmaf(in[x + kx], w, before);
                            }
                        }
                    }
                    // The row itself is the centre of sum R.
                    if (args.source == FmaSource::gelu_norm && args.shortcut) {
#pragma unroll
                        for (int x = 0; x < kStrip; ++x) {
                            sums[R][x] += load_shared<float>(&shared.g[r][base + R + x][lane]);
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
                const int row = stage + r - R;
                const int channel = channel0 + recompute_from(lane);
                if (row < item.first || channel >= args.C || item.image + image >= tiles.images)
                    continue;
                const std::uint32_t pixel =
                    row0 + (image * tiles.height + row) * tiles.width + item.x + strip * kStrip;
                const int outputs = tiles.width - item.x - strip * kStrip;
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
}

// Plans the tiles, and launches; the instances are in depthwise_fma.cu.
void launch_depthwise_fma(const char* name, DepthwiseFmaArgs args, int N, int H, int W,
                          int kernel_size, ElementType type, void* stream);

}  // namespace convnest::cuda
