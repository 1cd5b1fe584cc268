// nested_conv, forward, bf16 and fp16 on the tensor cores (after row_statistics of GELU(h)):
//
//     g = GELU(h);  z = (g − mean)·rstd·γ + β inside the image, 0 outside
//     u = [g +] Σ_{ky,kx} w[ky, kx] · z[y + ky − R, x + kx − R] + b;   v = GELU(u)
//
// Reads h, mean, rstd (halo of R pixels) and the parameters; writes v, and u where it is kept.
// A block takes 16 channels of one item of the canvas (common/canvas.cuh) and marches down its
// rows, 4 to a stage:
//     fill    GELU and norm of the 4 rows, transposed to channel planes in registers; g to the
//             shortcut's ring (each element is computed once, and once more in a strip's halo)
//     barrier
//     fetch   the next stage's 4 rows, asynchronously: their latency hides behind what follows
//     product the banded product (common/band.cuh), a warp has 2 channels; results in place
//     barrier
//     drain   finished rows: back to NHWC in registers, + g, GELU, 16-byte stores
// The thread that drains a pixel is the one that filled it, so that the shortcut's g stays with its
// thread, and no third barrier is needed. z, g and the convolution's sum are rounded to the
// activation's type, as eager does.
#pragma once

#include "common/band.cuh"
#include "common/gelu_norm.cuh"
#include "common/row_statistics.cuh"
#include "nested_conv_cuda.h"

namespace convnest::cuda {

// kVector below: 16-byte accesses; C % 8 == 0 and h, v and u are 16-byte aligned.
struct NestedConvFwdArgs {
    NestedConvFwdParams params;
    Canvas canvas;
    BottomImages bottom;
    std::uint32_t row_bytes;  // of a pixel's C channels
    int channel_blocks;
};

// g of the rows on their way: rows that finish in their own stage (R + row < 4) need one slot, the
// others two, in turn. Thread-private: [slot][channel pair][thread of the row] of 4 pixels.
template <int K>
struct ShortcutRing {
    static constexpr int kSlots = kStageRows + K / 2;
    uint4 pixels[kSlots][4][kThreads / kStageRows];

    __device__ __forceinline__ uint4* slot(const Role& role, int thread, int stage) {
        const int parity = stages_late<K>(role.row) ? stage & 1 : 0;
        return &pixels[recompute_from(role.row) + parity * (K / 2)][0]
                      [thread % (kThreads / kStageRows)];
    }
    static constexpr int kPairStride = kThreads / kStageRows;
};

template <int K>
struct NestedConvFwdShared {
    Planes planes;
    ShortcutRing<K> shortcut;
    Staging h;
    StageStatistics statistics;
    Bands<K> bands;
    Starts starts;
    BlockAffine affine;
    QuadOffsets offsets;
};
// Two blocks, and 1 KB of the system's for each, share the 164 KB of sm_80; one block fits the
// 99 KB of sm_86, sm_89 and sm_120.
static_assert(sizeof(NestedConvFwdShared<7>) <= 81 * 1024);

template <class Element, int K, bool kVector>
__global__ void __launch_bounds__(kThreads, kMinBlocks<K, kVector>)
    nested_conv_fwd_kernel(NestedConvFwdArgs args) {
    CONVNEST_SHARED_MEMORY(NestedConvFwdShared<K>, shared);
    constexpr int kPairStride = ShortcutRing<K>::kPairStride;
    constexpr std::uint32_t kNoPixel = 0xffffffffu;
    const NestedConvFwdParams& p = args.params;
    const Canvas& canvas = args.canvas;
    const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
    const int channel0 = blockIdx.x % args.channel_blocks * kBlockChannels;
    const Item item = item_of(canvas, blockIdx.x / args.channel_blocks);
    const Role role(thread);

    // Parameters
    fill_bands<Element, K>(shared.bands, p.conv_weight + channel0 * K * K, p.C - channel0, false,
                           thread);
    clear_zero_blocks(shared.planes, thread);
    shared.affine.fill(p.ln_weight, p.ln_bias, channel0, p.C, thread);
    fill_starts(shared.starts, p.conv_bias, channel0, p.C, thread);

    // Where this thread reads and writes
    const int octet0 = channel0 + role.half * 8, channels = p.C - octet0;
    const PixelQuad quad(canvas, item, role.quad * 4 - kLeadPixels);
    const QuadBits pixels(quad, args.bottom, channels > 0);
    shared.offsets.store(quad, role);

    // The next stage's row, on its way
    RowWalk<K / 2> walk(canvas, item, role.row);
    const auto present = [&] {  // bits of the row, see QuadBits
        const bool reads = walk.inside(canvas, args.bottom);
        return reads ? pixels.at(walk.pixel, args.bottom) : 0;
    };
    const auto fetch = [&] {
        const unsigned bits = present();
        const auto* h = static_cast<const std::uint16_t*>(p.h) + recompute_from(octet0);
        std::uint32_t offset[4];
        shared.offsets.load(offset, role);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const std::uint32_t pixel = walk.pixel + offset[i];
            shared.h.template fetch<kVector>(thread, i, at_pixel(h, pixel, args.row_bytes),
                                             channels, bits >> (8 + i) & 1);
            shared.statistics.fetch(role, i, p.mean, p.rstd, pixel, bits >> i & 1);
        }
        async_copy_commit();
    };
    const auto fill = [&](int stage) {
        uint4* kept = shared.shortcut.slot(role, thread, stage);
        async_copy_wait<0>();
        __syncwarp();
        if (!walk.inside(canvas)) return clear_quad(role, shared.planes);
        const unsigned bits = present();
        Octet raw[4];
        shared.h.take(raw, thread);
        const QuadNorm norm(shared.statistics, role);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            std::uint32_t g[4];
            gelu_norm_pair<Element>(raw, k, norm, shared.affine, bits, role, shared.planes, g);
            if (p.shortcut) {
                store_shared(kept + k * kPairStride, make_uint4(g[0], g[1], g[2], g[3]));
            }
        }
    };
    // This thread's cells hold the outputs of the row that it filled in `stage`; `row` is the
    // row's first pixel.
    const auto drain = [&](int stage, std::uint32_t row) {
        if (row == kNoPixel) return;
        const uint4* kept = shared.shortcut.slot(role, thread, stage);
        Octet out[4];  // u, then v
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            join_pair(load_shared<uint2>(shared.planes.bytes + role.cell(2 * k)),
                      load_shared<uint2>(shared.planes.bytes + role.cell(2 * k + 1)), k, out);
            if (p.shortcut) {
                const auto g = load_shared<uint4>(kept + k * kPairStride);
                out[0].pair[k] = Element::add(out[0].pair[k], g.x);
                out[1].pair[k] = Element::add(out[1].pair[k], g.y);
                out[2].pair[k] = Element::add(out[2].pair[k], g.z);
                out[3].pair[k] = Element::add(out[3].pair[k], g.w);
            }
        }
        const unsigned bits = pixels.at(row, args.bottom);
        std::uint32_t offset[4];
        shared.offsets.load(offset, role);
        const auto store = [&](void* v) {
            std::uint16_t* tensor = static_cast<std::uint16_t*>(v) + recompute_from(octet0);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (bits >> (12 + i) & 1) {
                    store_octet<kVector>(at_pixel(tensor, row + offset[i], args.row_bytes), out[i],
                                         channels);
                }
            }
        };
        if (p.u != nullptr) store(p.u);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                std::uint32_t& pair = out[i].pair[k];
                pair = Element::pack(gelu_fast<Element>(Element::low(pair)),
                                     gelu_fast<Element>(Element::high(pair)));
            }
        }
        store(p.v);
    };

    __syncthreads();  // parameters and offsets are in shared memory
    fetch();
    Ring<K> ring[kWarpChannels];
#pragma unroll
    for (int c = 0; c < kWarpChannels; ++c) {
        FragmentC start;
        load_start(start, shared.starts, warp * kWarpChannels + c);
        begin<K>(ring[c], start);
    }
    const int late = stages_late<K>(role.row);
    OutputRows outputs(item, role.row);
    std::uint32_t row_before = kNoPixel;
    // `stage`: how many are left. The one before has the number one higher.
#pragma unroll 1
    for (int stage = (item.end + K / 2 - item.start + kStageRows - 1) / kStageRows; stage > 0;
         --stage, outputs.advance(kStageRows)) {
        fill(stage);
        const bool is_output = outputs.holds() && walk.inside(canvas);
        const std::uint32_t filled_row = is_output ? walk.pixel : kNoPixel;
        __syncthreads();
        walk.advance(canvas, kStageRows);
        if (stage > 1) fetch();
#pragma unroll
        for (int c = 0; c < kWarpChannels; ++c) {
            const int channel = warp * kWarpChannels + c;
            FragmentB band[K];
            load_band<K>(band, band_address<K>(shared.bands, channel, lane));
            FragmentC start;
            load_start(start, shared.starts, channel);
            convolve_stage<Element, K>(ring[c], band, shared.planes.bytes, warp_plane(warp, c),
                                       lane, start);
        }
        __syncthreads();
        drain(stage + late, late ? row_before : filled_row);
        row_before = filled_row;
    }
}

}  // namespace convnest::cuda
