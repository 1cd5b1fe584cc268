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
    std::uint32_t pixel_count;  // N·H·W
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
        return &pixels[role.row + parity * (K / 2)][0][thread % (kThreads / kStageRows)];
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
    const std::uint32_t row_bytes = 2 * static_cast<std::uint32_t>(p.C);
    const std::uint16_t* h = static_cast<const std::uint16_t*>(p.h) + octet0;
    std::uint16_t* v = static_cast<std::uint16_t*>(p.v) + octet0;
    std::uint16_t* u = static_cast<std::uint16_t*>(p.u) + octet0;
    // Bits 0–3: readable pixels, 4–7: outputs, 8: this thread's channels exist
    const unsigned pixels = quad.readable | (channels > 0 ? quad.owned << 4 | 1u << 8 : 0u);

    shared.offsets.store(quad, role);

    // The next stage's row, on its way
    RowWalk<K / 2> walk(canvas, item, role.row);
    unsigned present;  // bits: the pixel exists
    const auto fetch = [&] {
        present = walk.inside(canvas) ? pixels & 15 : 0;
        std::uint32_t offset[4];
        shared.offsets.load(offset, role);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const std::uint32_t pixel = walk.pixel + offset[i];
            if (pixel >= args.pixel_count) present &= ~(1u << i);
            const bool exists = present >> i & 1;
            shared.h.template fetch<kVector>(thread, i, at_pixel(h, pixel, row_bytes), channels,
                                             exists && (pixels >> 8));
            shared.statistics.fetch(role, i, p.mean, p.rstd, pixel, exists);
        }
        async_copy_commit();
    };
    const auto fill = [&](int stage) {
        uint4* kept = shared.shortcut.slot(role, thread, stage);
        async_copy_wait<0>();
        __syncwarp();
        if (!walk.inside(canvas)) return clear_quad(role, shared.planes);
        Octet raw[4];
        shared.h.take(raw, thread);
        const QuadNorm norm(shared.statistics, role);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            std::uint32_t g[4];
            gelu_norm_pair<Element>(raw, k, norm, shared.affine, present, role, shared.planes, g);
            if (p.shortcut) {
                store_shared(kept + k * kPairStride, make_uint4(g[0], g[1], g[2], g[3]));
            }
        }
    };
    // This thread's cells hold the outputs of the row that it filled in `stage`; `row` is the
    // row's first pixel.
    const auto drain = [&](int stage, std::uint32_t row) {
        if (row == kNoPixel) return;
        uint4* kept = shared.shortcut.slot(role, thread, stage);
        Octet out[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const uint2 low = load_shared<uint2>(shared.planes.bytes + role.cell(2 * k));
            const uint2 high = load_shared<uint2>(shared.planes.bytes + role.cell(2 * k + 1));
            uint4 pairs = make_uint4(0, 0, 0, 0);
            if (p.shortcut) pairs = load_shared<uint4>(kept + k * kPairStride);
            const auto finish = [&](float sum_low, float sum_high, std::uint32_t& pair, int pixel) {
                const float u_low = sum_low + Element::low(pair);
                const float u_high = sum_high + Element::high(pair);
                pair = Element::pack(u_low, u_high);
                out[pixel].pair[k] = Element::pack(gelu_fast(u_low), gelu_fast(u_high));
            };
            finish(Element::low(low.x), Element::low(high.x), pairs.x, 0);
            finish(Element::high(low.x), Element::high(high.x), pairs.y, 1);
            finish(Element::low(low.y), Element::low(high.y), pairs.z, 2);
            finish(Element::high(low.y), Element::high(high.y), pairs.w, 3);
            // u waits in the slot that g has left, until v's registers are free.
            if (p.u != nullptr) store_shared(kept + k * kPairStride, pairs);
        }
        std::uint32_t offset[4];
        shared.offsets.load(offset, role);
        const auto store = [&](std::uint16_t* tensor) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const std::uint32_t pixel = row + offset[i];
                if ((pixels >> (4 + i) & 1) && pixel < args.pixel_count) {
                    store_octet<kVector>(at_pixel(tensor, pixel, row_bytes), out[i], channels);
                }
            }
        };
        store(v);
        if (p.u == nullptr) return;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const uint4 pairs = load_shared<uint4>(kept + k * kPairStride);
            out[0].pair[k] = pairs.x, out[1].pair[k] = pairs.y;
            out[2].pair[k] = pairs.z, out[3].pair[k] = pairs.w;
        }
        store(u);
    };

    shared.h.clear(thread);
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
    const int stages = (item.end + K / 2 - item.start + kStageRows - 1) / kStageRows;
    std::uint32_t row_before = kNoPixel;
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
        fill(stage);
        const int own = item.start + stage * kStageRows + role.row;
        const bool is_output = own >= item.first && own < item.end && walk.inside(canvas);
        const std::uint32_t filled_row = is_output ? walk.pixel : kNoPixel;
        __syncthreads();
        walk.advance(canvas, kStageRows);
        if (stage + 1 < stages) fetch();
#pragma unroll
        for (int c = 0; c < kWarpChannels; ++c) {
            const int channel = warp * kWarpChannels + c;
            FragmentB band[K];
            load_band<K>(band, band_address<K>(shared.bands, channel, lane));
            FragmentC start;
            load_start(start, shared.starts, channel);
            convolve_stage<Element, K>(ring[c], band, shared.planes.bytes, channel, lane, start);
        }
        __syncthreads();
        drain(stage - late, late ? row_before : filled_row);
        row_before = filled_row;
    }
}

}  // namespace convnest::cuda
