// A depthwise K×K convolution of bf16 or fp16 on the tensor cores, without norm:
//
//     kTensor:       y = DW(x) [+ bias]                      (dwconv_gelu_layernorm's c)
//                    dx = DWᵀ(dy), with `flipped` weights    (its gradient)
//     kGeluGradient: du = dv ⊙ GELU'(u);  dz = DWᵀ(du)       (nested_conv's), du is written too
//
// Reads x, or u and dv, with a halo of K/2; writes y (and du of the item's own pixels). Work maps
// to blocks as in nested_conv.cuh: 16 channels of an item of the canvas, 4 rows to a stage, two
// barriers. The output goes from its planes to NHWC by byte permutations alone.
#pragma once

#include "common/band.cuh"
#include "common/gelu.cuh"

namespace convnest::cuda {

enum class Source { tensor, gelu_gradient };

struct DepthwiseArgs {
    const std::uint16_t* x;  // [N, H, W, C]; of gelu_gradient: dv
    const std::uint16_t* u;  // [N, H, W, C]; gelu_gradient only
    std::uint16_t* y;        // [N, H, W, C]
    std::uint16_t* du;       // [N, H, W, C]; gelu_gradient only
    const float* weight;     // [C, K·K]
    const float* bias;       // [C] or null
    bool flipped;
    int C;
    Canvas canvas;
    int channel_blocks;
    // The launch fills in what follows from these.
    BottomImages bottom = {};
    std::uint32_t row_bytes = 0;  // of a pixel's C channels
};

template <Source kSource>
struct InputStaging {
    Staging x;
};

template <>
struct InputStaging<Source::gelu_gradient> {
    Staging x, u;
};

template <int K, Source kSource>
struct DepthwiseShared {
    Planes planes;
    Bands<K> bands;
    Starts starts;
    QuadOffsets offsets;
    InputStaging<kSource> staging;
};
static_assert(sizeof(DepthwiseShared<7, Source::gelu_gradient>) <= 81 * 1024);

// kVector: 16-byte accesses; C % 8 == 0 and all tensors are 16-byte aligned.
template <class Element, int K, Source kSource, bool kVector>
__global__ void __launch_bounds__(kThreads, kMinBlocks<K, kVector>)
    depthwise_kernel(DepthwiseArgs args) {
    using Shared = DepthwiseShared<K, kSource>;
    CONVNEST_SHARED_MEMORY(Shared, shared);
    constexpr std::uint32_t kNoPixel = 0xffffffffu;
    constexpr bool kGelu = kSource == Source::gelu_gradient;
    const Canvas& canvas = args.canvas;
    const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
    const int channel0 = blockIdx.x % args.channel_blocks * kBlockChannels;
    const Item item = item_of(canvas, blockIdx.x / args.channel_blocks);
    const Role role(thread);

    // Parameters
    fill_bands<Element, K>(shared.bands, args.weight + channel0 * K * K, args.C - channel0,
                           args.flipped, thread);
    clear_zero_blocks(shared.planes, thread);
    fill_starts(shared.starts, args.bias, channel0, args.C, thread);

    // Where this thread reads and writes
    const int octet0 = channel0 + role.half * 8, channels = args.C - octet0;
    const PixelQuad quad(canvas, item, role.quad * 4 - kLeadPixels);
    const QuadBits pixels(quad, args.bottom, channels > 0);
    shared.offsets.store(quad, role);

    // The next stage's row, on its way
    RowWalk<K / 2> walk(canvas, item, role.row);
    const auto fetch = [&] {
        const bool reads = walk.inside(canvas, args.bottom);
        const unsigned bits = reads ? pixels.at(walk.pixel, args.bottom) : 0;
        const int octet = recompute_from(octet0);  // a pointer kept would take two registers
        std::uint32_t offset[4];
        shared.offsets.load(offset, role);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const std::uint32_t pixel = walk.pixel + offset[i];
            const bool exists = bits >> (8 + i) & 1;
            shared.staging.x.template fetch<kVector>(
                thread, i, at_pixel(args.x + octet, pixel, args.row_bytes), channels, exists);
            if constexpr (kGelu) {
                shared.staging.u.template fetch<kVector>(
                    thread, i, at_pixel(args.u + octet, pixel, args.row_bytes), channels, exists);
            }
        }
        async_copy_commit();
    };
    const auto store = [&](std::uint16_t* tensor, std::uint32_t row, const Octet(&octets)[4]) {
        const unsigned bits = pixels.at(row, args.bottom);
        std::uint16_t* first = tensor + recompute_from(octet0);
        std::uint32_t offset[4];
        shared.offsets.load(offset, role);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (bits >> (12 + i) & 1) {
                store_octet<kVector>(at_pixel(first, row + offset[i], args.row_bytes), octets[i],
                                     channels);
            }
        }
    };
    // `row`: first pixel of the row being filled, if its pixels are this item's outputs
    const auto fill = [&](std::uint32_t row) {
        async_copy_wait<0>();
        if (kGelu && !walk.inside(canvas)) return clear_quad(role, shared.planes);
        Octet value[4];
        shared.staging.x.take(value, thread);
        if constexpr (kGelu) {
            Octet u[4];
            shared.staging.u.take(u, thread);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    std::uint32_t& pair = value[i].pair[k];
                    pair = Element::pack(
                        Element::low(pair) * gelu_slope_fast<Element>(Element::low(u[i].pair[k])),
                        Element::high(pair) *
                            gelu_slope_fast<Element>(Element::high(u[i].pair[k])));
                }
            }
        }
        store_quad(value, role, shared.planes);
        if constexpr (kGelu) {
            if (row != kNoPixel) store(args.du, row, value);
        }
    };
    const auto drain = [&](std::uint32_t row) {
        if (row == kNoPixel) return;
        Octet out[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            join_pair(load_shared<uint2>(shared.planes.bytes + role.cell(2 * k)),
                      load_shared<uint2>(shared.planes.bytes + role.cell(2 * k + 1)), k, out);
        }
        store(args.y, row, out);
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
    const bool late = stages_late<K>(role.row);
    OutputRows outputs(item, role.row);
    std::uint32_t row_before = kNoPixel;
#pragma unroll 1
    for (int stage = (item.end + K / 2 - item.start + kStageRows - 1) / kStageRows; stage > 0;
         --stage, outputs.advance(kStageRows)) {
        const bool is_output = outputs.holds() && walk.inside(canvas);
        const std::uint32_t filled_row = is_output ? walk.pixel : kNoPixel;
        fill(filled_row);
        __syncthreads();
        walk.advance(canvas, kStageRows);
        if (stage > 1) fetch();
#pragma unroll
        for (int c = 0; c < kWarpChannels; ++c) {
            const int channel = warp * kWarpChannels + c;
            FragmentB band[K];
            FragmentC start;
            load_band<K>(band, band_address<K>(shared.bands, channel, lane));
            load_start(start, shared.starts, channel);
            convolve_stage<Element, K>(ring[c], band, shared.planes.bytes, warp_plane(warp, c),
                                       lane, start);
        }
        __syncthreads();
        drain(late ? row_before : filled_row);
        row_before = filled_row;
    }
}

template <class Element, int K, Source kSource, bool kVector>
void launch_depthwise(const char* name, DepthwiseArgs args, void* stream) {
    args.bottom = bottom_images(args.canvas);
    args.row_bytes = 2 * static_cast<std::uint32_t>(args.C);
    run({.kernel = name,
         .grid = dim3(static_cast<unsigned>(args.canvas.items) * args.channel_blocks),
         .block = dim3(kThreads),
         .shared_bytes = sizeof(DepthwiseShared<K, kSource>),
         .stream = stream},
        depthwise_kernel<Element, K, kSource, kVector>, args);
}

}  // namespace convnest::cuda
