// Both gradients of a depthwise K×K convolution of small maps (H, W <= 8), bf16 or fp16, on the
// tensor cores, in one kernel:
//
//     MapSource::tensor     dx = DWᵀ(dy);  dw[ky, kx] = Σ x[y + ky − R, x + kx − R] · dy[y, x];
//                           db = Σ dy
//     MapSource::gelu_norm  the same of du = dy ⊙ GELU'(u) in place of dy and
//                           z = (GELU(x) − mean)·rstd·γ + β in place of x; du is written too
//
// Reads x (mean, rstd, u), dy; writes dx (du) and partial sums: dw [groups, C, K·K] and db
// [groups, C]. A group is the tiles (small_map.cuh) that one block takes, in order; sum_partials()
// adds them, in order. Their number depends on the shape alone, so that results repeat bit by bit.
//
// A tile takes two barriers: planes of x (or z) and of dy (or du) are filled, a warp computes both
// gradients of its 2 channels, dx in the place of dy, and threads drain what they filled.
//
// dw contracts over the images m of the tile: A holds two rows y' of z, B a row y of du,
//
//     Q[j, n] = Σ_m z[m; y', j] · du[m; y, n]        for every y' and y;  ky = y' − y + R,
//                                                     kx = j − n + R
//
// both from the planes by ldmatrix.trans; accumulator k0 + 1 gathers the pairs of rows that start
// at kernel row k0. Q's diagonals are summed through the channel's plane of z, which is spent.
#pragma once

#include "common/depthwise_small.h"
#include "common/small_map.cuh"

namespace convnest::cuda {

// dv becomes du.
template <class Element, int kPixels>
__device__ __forceinline__ void gelu_gradient(MapRow<kPixels>& dv, const MapRow<kPixels>& u) {
#pragma unroll
    for (int x = 0; x < kPixels; ++x) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            std::uint32_t& pair = dv[x].pair[k];
            pair = Element::pack(
                Element::low(pair) * gelu_slope_fast<Element>(Element::low(u[x].pair[k])),
                Element::high(pair) * gelu_slope_fast<Element>(Element::high(u[x].pair[k])));
        }
    }
}

template <int K>
using MapProducts = FragmentC[K + 1];

template <class Element, int K, int kSide>
__device__ __forceinline__ void correlate_map(MapProducts<K>& sums, FragmentC& bias_sum,
                                              const unsigned char* z, const unsigned char* du,
                                              int lane) {
    constexpr int R = K / 2;
    FragmentB gradient[kMapSide];
#pragma unroll
    for (int p = 0; p < kMapPairs; ++p) {
        std::uint32_t r[4];
        load_matrices<true>(r, du + p * 2 * kMapRowBytes + lane * 16);
        gradient[2 * p][0] = r[0], gradient[2 * p][1] = r[1];
        gradient[2 * p + 1][0] = r[2], gradient[2 * p + 1][1] = r[3];
    }
    // Matrices in the order of fragment A: rows 2p, 2p + 1 of images 0–7, then of 8–15.
    const unsigned char* windows =
        z + (lane & 7) * 16 + (lane >> 3 & 1) * kMapRowBytes + (lane >> 4) * (kMapRowBytes / 2);
#pragma unroll
    for (int p = 0; p < kMapPairs; ++p) {
        FragmentA window;
        load_matrices<true>(window, windows + p * 2 * kMapRowBytes);
#pragma unroll
        for (int y = 0; y < kSide; ++y) {
            const int k0 = 2 * p - y + R;
            if (k0 >= -1 && k0 < K) {
                mma<Element>(sums[k0 + 1], window, gradient[y], sums[k0 + 1]);
            }
        }
    }
    constexpr std::uint32_t one = Element::kOnes;
    const FragmentA ones = {one, one, one, one};
#pragma unroll
    for (int y = 0; y < kSide; ++y) mma<Element>(bias_sum, ones, gradient[y], bias_sum);
}

// The taps of the block's channels and, behind them, db, over all of its tiles. Each element is one
// lane's own: in shared memory to spare registers.
template <int K>
struct MapTaps {
    static constexpr int kRowWords =
        64 + K + 1;  // even; of neighbouring taps two share a bank at most
    static constexpr int kFit = kMapPlaneBytes / 4 / kRowWords;
    static constexpr int kChunk = K < kFit ? K : kFit;  // kernel rows at once
    float channels[kBlockChannels][K * K + 1];

    // f(element, row, kx) for the taps of this lane's in kernel rows first, first + 1 …
    template <class F>
    __device__ __forceinline__ void each(int channel, int first, int lane, const F& f) {
#pragma unroll
        for (int tap = 0; tap < kChunk * K; tap += kWarpSize) {
            const int row = (tap + lane) / K, kx = tap + lane - row * K;
            if (row < kChunk && first + row < K) {
                f(&channels[channel][first * K + tap + lane], row, kx);
            }
        }
    }

    __device__ __forceinline__ void clear(int channel, int lane) {
#pragma unroll
        for (int first = 0; first < K; first += kChunk) {
            each(channel, first, lane, [](float* tap, int, int) { store_shared(tap, 0.f); });
        }
        if (lane == 0) store_shared(&channels[channel][K * K], 0.f);
    }

    // Adds the diagonals of a tile's Q. `scratch`: the channel's plane of z.
    __device__ __forceinline__ void add(int channel, const MapProducts<K>& products,
                                        const FragmentC& bias_sum, unsigned char* scratch,
                                        int lane) {
        const int g = lane >> 2, t = lane & 3;
        const auto word = [&](int row, int j, int n) {
            return scratch + (row * kRowWords + j * 8 + n) * 4;
        };
#pragma unroll
        for (int first = 0; first < K; first += kChunk) {
            __syncwarp();  // the plane, or the rows before, have been read
#pragma unroll
            for (int row = 0; row < kChunk; ++row) {
                const int ky = first + row;
                if (ky >= K) break;
                store_shared(word(row, g, 2 * t),
                             make_float2(products[ky + 1][0] + products[ky][2],
                                         products[ky + 1][1] + products[ky][3]));
            }
            __syncwarp();
            each(channel, first, lane, [&](float* tap, int row, int kx) {
                float sum = load_shared<float>(tap);
                const int d = kx - K / 2;
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    if (j - d >= 0 && j - d < 8) sum += load_shared<float>(word(row, j, j - d));
                }
                store_shared(tap, sum);
            });
        }
        float sum = bias_sum[0] + bias_sum[1];  // of row 0, all rows being the same
        sum += __shfl_xor_sync(kFullWarp, sum, 1);
        sum += __shfl_xor_sync(kFullWarp, sum, 2);
        if (lane != 0) return;
        float* bias = &channels[channel][K * K];
        store_shared(bias, load_shared<float>(bias) + sum);
    }

    // dweight: [K·K] of the channel.
    __device__ __forceinline__ void store(int channel, float* dweight, float* dbias, int lane) {
#pragma unroll
        for (int first = 0; first < K; first += kChunk) {
            each(channel, first, lane, [&](float* tap, int row, int kx) {
                store_global(dweight + (first + row) * K + kx, load_shared<float>(tap));
            });
        }
        if (lane == 0) store_global(dbias, load_shared<float>(&channels[channel][K * K]));
    }
};

template <int K>
struct DepthwiseSmallBwdShared {
    MapPlanes z, du;
    MapBands<K> bands;
    MapTaps<K> taps;
    BlockAffine affine;
};
// Two blocks, and 1 KB of the system's for each, share the 164 KB of sm_80; one block fits the
// 99 KB of sm_86, sm_89 and sm_120.
static_assert(sizeof(DepthwiseSmallBwdShared<7>) <= 81 * 1024);
static_assert(sizeof(DepthwiseSmallBwdShared<13>) <= 99 * 1024);

// kSide: 7 for maps of 7×7, whose every index is then known; 8 for all others.
template <class Element, int K, int kSide, MapSource kSource>
__global__ void __launch_bounds__(kThreads, K <= 7 ? kBlocksPerSm : 1)
    depthwise_small_bwd_kernel(DepthwiseSmallBwdArgs args) {
    CONVNEST_SHARED_MEMORY(DepthwiseSmallBwdShared<K>, shared);
    constexpr bool kNested = kSource == MapSource::gelu_norm;
    const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
    const int height = kSide < kMapSide ? kSide : args.H;
    const int width = kSide < kMapSide ? kSide : args.W;
    const int channel0 = blockIdx.x % args.channel_blocks * kBlockChannels;
    const int group = blockIdx.x / args.channel_blocks;
    const bool wants_taps = args.dweight != nullptr;

    shared.bands.template fill<Element>(args.weight + channel0 * K * K, args.C - channel0, true,
                                        thread);
    if constexpr (kNested) {
        shared.affine.fill(args.ln_weight, args.ln_bias, channel0, args.C, thread);
        __syncthreads();  // γ and β
    }
#pragma unroll
    for (int c = 0; c < kWarpChannels; ++c) shared.taps.clear(warp * kWarpChannels + c, lane);

    const int tiles = (args.N + kMapImages - 1) / kMapImages;
#pragma unroll 1
    for (int tile = group; tile < tiles; tile += args.groups) {
        // The threads' roles are taken anew for each step, for registers are what the fill lacks.
        {
            const MapRole role(recompute_from(thread));
            const int octet0 = channel0 + role.half * 8;
            const MapPlace place(role, tile, args.N, height, width, args.C - octet0);
            MapRow<kSide> dy;
            load_map_row<kSide>(dy, args.dy + octet0, place, width, args.C);
            if constexpr (kNested) {
                MapRow<kSide> u;
                load_map_row<kSide>(u, args.u + octet0, place, width, args.C);
                gelu_gradient<Element, kSide>(dy, u);
                store_map_row<kSide>(dy, args.du + octet0, place, width, args.C);
            }
            row_to_planes<kSide>(dy, role, shared.du);
        }
        if (wants_taps) {
            const MapRole role(recompute_from(thread));
            const int octet0 = channel0 + role.half * 8;
            const MapPlace place(role, tile, args.N, height, width, args.C - octet0);
            MapRow<kSide> x;
            load_map_row<kSide>(x, args.x + octet0, place, width, args.C);
            if (kNested && role.row < height) {
                const MapNorm<kSide> norm(args.mean, args.rstd, place, width);
                gelu_norm_row<Element, kSide>(x, norm, shared.affine, width, role, shared.z);
            } else {
                row_to_planes<kSide>(x, role, shared.z);
            }
        }
        __syncthreads();
        const int worker = recompute_from(thread);
#pragma unroll
        for (int c = 0; c < kWarpChannels; ++c) {
            const int channel = worker / kWarpSize * kWarpChannels + c, lane = worker % kWarpSize;
            unsigned char* z = shared.z.of(channel);
            unsigned char* du = shared.du.of(channel);
            if (wants_taps) {
                MapProducts<K> products = {};
                FragmentC bias_sum = {};
                correlate_map<Element, K, kSide>(products, bias_sum, z, du, lane);
                shared.taps.add(channel, products, bias_sum, z, lane);
            }
            if (args.dx != nullptr) {
                convolve_map<Element, K, kSide>(du, shared.bands.of(channel, lane), 0.f, lane);
            }
        }
        __syncthreads();
        const MapRole role(recompute_from(thread));
        if (args.dx != nullptr && role.row < height) {
            const int octet0 = channel0 + role.half * 8;
            const MapPlace place(role, tile, args.N, height, width, args.C - octet0);
            MapRow<kSide> dx;
            planes_to_row<kSide>(dx, role, shared.du);
            store_map_row<kSide>(dx, args.dx + octet0, place, width, args.C);
        }
    }

    if (!wants_taps) return;
#pragma unroll
    for (int c = 0; c < kWarpChannels; ++c) {
        const int channel = warp * kWarpChannels + c;
        if (channel0 + channel >= args.C) continue;
        const std::size_t index = static_cast<std::size_t>(group) * args.C + channel0 + channel;
        shared.taps.store(channel, args.dweight + index * K * K, args.dbias + index, lane);
    }
}

}  // namespace convnest::cuda
