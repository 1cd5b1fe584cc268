// A depthwise K×K convolution of small maps (H, W <= 8), bf16 or fp16, on the tensor cores:
//
//     MapSource::tensor     y = DW(x) [+ bias]
//     MapSource::gelu_norm  g = GELU(x);  u = [g +] DW((g − mean)·rstd·γ + β) + bias;  y = GELU(u),
//                           and u is kept
//
// Reads x (mean, rstd) and the parameters; writes y (and u). A block takes 16 channels of 16 images
// (small_map.cuh), once:
//     fill     a thread reads a row of an image in 8 channels, 16 bytes a pixel; prologue and
//              transpose in its registers, to channel planes; g stays in its registers
//     barrier
//     product  a warp has 2 channels, results in place
//     barrier
//     drain    the thread's row back to NHWC; + g, GELU; 16-byte stores
// What hides the latency of a block's loads is the other blocks of the SM.
#pragma once

#include "common/depthwise_small.h"
#include "common/small_map.cuh"

namespace convnest::cuda {

template <int K>
struct DepthwiseSmallShared {
    MapPlanes planes;
    MapBands<K> bands;
    BlockAffine affine;
};
// Blocks that are to share an SM, and so registers: 80 a thread, or 128 with both GELUs. Three, and
// 1 KB of the system's for each, share the 164 KB of sm_80.
static_assert(3 * (sizeof(DepthwiseSmallShared<7>) + 1024) <= 164 * 1024);

template <MapSource kSource>
constexpr int kSmallBlocksPerSm = kSource == MapSource::tensor ? 3 : 2;

// kSide: 7 for maps of 7×7, whose every index is then known; 8 for all others.
template <class Element, int K, int kSide, MapSource kSource>
__global__ void __launch_bounds__(kThreads, kSmallBlocksPerSm<kSource>)
    depthwise_small_kernel(DepthwiseSmallArgs args) {
    CONVNEST_SHARED_MEMORY(DepthwiseSmallShared<K>, shared);
    constexpr bool kNested = kSource == MapSource::gelu_norm;
    const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
    const int height = kSide < kMapSide ? kSide : args.H;
    const int width = kSide < kMapSide ? kSide : args.W;
    const int channel0 = blockIdx.x % args.channel_blocks * kBlockChannels;
    const MapRole role(thread);
    const int octet0 = channel0 + role.half * 8;
    const MapPlace place(role, blockIdx.x / args.channel_blocks, args.N, height, width,
                         args.C - octet0);

    MapRow<kSide> row;
    load_map_row<kSide>(row, args.x + octet0, place, width, args.C);
    shared.bands.template fill<Element>(args.weight + channel0 * K * K, args.C - channel0, false,
                                        thread);
    float starts[kWarpChannels];
#pragma unroll
    for (int c = 0; c < kWarpChannels; ++c) {
        const int channel = channel0 + warp * kWarpChannels + c;
        starts[c] =
            args.bias != nullptr && channel < args.C ? load_global(args.bias + channel) : 0.f;
    }
    if constexpr (kNested) {
        const MapNorm<kSide> norm(args.mean, args.rstd, place, width);
        shared.affine.fill(args.ln_weight, args.ln_bias, channel0, args.C, thread);
        __syncthreads();  // γ and β
        if (role.row < height) {
            gelu_norm_row<Element, kSide>(row, norm, shared.affine, width, role, shared.planes);
        } else {
            row_to_planes<kSide>(row, role, shared.planes);  // zeros
        }
    } else {
        row_to_planes<kSide>(row, role, shared.planes);
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kWarpChannels; ++c) {
        const int channel = warp * kWarpChannels + c;
        convolve_map<Element, K, kSide>(shared.planes.of(channel), shared.bands.of(channel, lane),
                                        starts[c], lane);
    }
    __syncthreads();
    if (role.row >= height) return;
    MapRow<kSide> out;  // y, or u, then v
    planes_to_row<kSide>(out, role, shared.planes);
    if constexpr (kNested) {
        const auto each_pair = [&](const auto& f) {
#pragma unroll
            for (int x = 0; x < kSide; ++x) {
#pragma unroll
                for (int k = 0; k < 4; ++k) out[x].pair[k] = f(out[x].pair[k], row[x].pair[k]);
            }
        };
        if (args.shortcut) each_pair([](auto sum, auto g) { return Element::add(sum, g); });
        if (args.u != nullptr) {
            store_map_row<kSide>(out, args.u + octet0, place, width, args.C);
        }
        each_pair([](auto u, auto) {
            return Element::pack(gelu_fast<Element>(Element::low(u)),
                                 gelu_fast<Element>(Element::high(u)));
        });
    }
    store_map_row<kSide>(out, args.y + octet0, place, width, args.C);
}

}  // namespace convnest::cuda
