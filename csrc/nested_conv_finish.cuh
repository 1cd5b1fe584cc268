// nested_conv, backward, the finishing kernel of the two (nested_conv_bwd.cuh):
//
//     dh = GELU'(h) ⊙ (p − rstd·(m1 + x̂·m2)),   x̂ = (GELU(h) − mean)·rstd
//
// with m1 and m2 the means over a pixel's channels of γ·dz and γ·dz·x̂. Reads p, h, mean, rstd and
// the row sums; writes dh, which may lie where p does: the thread that writes 16 bytes of dh is the
// one that has read those of p.
//
// A block of 256 threads takes `rows` pixels: it adds up their sums, in a fixed order, and then
// goes over their vectors of 8 channels.
#pragma once

#include "common/gelu.cuh"
#include "common/plan.cuh"
#include "common/row_vector.cuh"

namespace convnest::cuda {

constexpr int kFinishThreads = 256;

// C % 8 == 0, and all tensors are 16-byte aligned.
struct NestedConvFinishArgs {
    const std::uint16_t* p;  // [pixels, C]
    const std::uint16_t* h;  // [pixels, C]
    const float* mean;       // [pixels]
    const float* rstd;       // [pixels]
    const float2* row_sums;  // [channel_blocks, pixels]
    std::uint16_t* dh;       // [pixels, C]; may be p
    std::uint32_t pixels;
    int C;
    int channel_blocks;
    int rows;  // pixels of a block: a power of two, 32 at most
    // ⌈2^31 / (C / 8)⌉, by which a block's vectors (2^15 at most) are divided among its rows
    std::uint32_t octet_reciprocal;
};

struct NestedConvFinishShared {
    float2 parts[kFinishThreads];  // [part][row]
    float4 rows[32];               // what a row's norm comes to
};

template <class Element>
__global__ void __launch_bounds__(kFinishThreads)
    nested_conv_finish_kernel(NestedConvFinishArgs args) {
    CONVNEST_SHARED_MEMORY(NestedConvFinishShared, shared);
    const int thread = threadIdx.x, row = thread & (args.rows - 1);
    const std::uint32_t first = blockIdx.x * args.rows;
    const int parts = kFinishThreads / args.rows;
    const bool exists = first + row < args.pixels;

    float2 sum = make_float2(0.f, 0.f);
    if (exists) {
        for (int block = thread / args.rows; block < args.channel_blocks; block += parts) {
            const auto part = load_global(
                args.row_sums + static_cast<std::size_t>(block) * args.pixels + first + row);
            sum.x += part.x, sum.y += part.y;
        }
    }
    store_shared(&shared.parts[thread], sum);
    __syncthreads();
    if (thread < args.rows && exists) {
        for (int part = 1; part < parts; ++part) {
            const auto other = load_shared<float2>(&shared.parts[part * args.rows + row]);
            sum.x += other.x, sum.y += other.y;
        }
        const float mean = load_global(args.mean + first + row);
        const float rstd = load_global(args.rstd + first + row);
        const float each = -rstd / static_cast<float>(args.C);
        // rstd, −mean·rstd, −rstd·m1, −rstd·m2
        store_shared(&shared.rows[row],
                     make_float4(rstd, -mean * rstd, each * sum.x, each * sum.y));
    }
    __syncthreads();

    using Vector = RowVector<Element, 8>;
    const int octets = args.C / 8;
    const std::uint32_t rows = args.pixels - first < static_cast<std::uint32_t>(args.rows)
                                   ? args.pixels - first
                                   : static_cast<std::uint32_t>(args.rows);
    const std::size_t offset = static_cast<std::size_t>(first) * args.C;
    for (std::uint32_t i = thread; i < rows * octets; i += kFinishThreads) {
        const Vector h = Vector::template load<true>(args.h + offset + i * 8, 8);
        const uint4 p = load_global_in_place(reinterpret_cast<const uint4*>(args.p + offset) + i);
        const int owner =
            static_cast<int>(static_cast<std::uint64_t>(i) * args.octet_reciprocal >> 31);
        const auto norm = load_shared<float4>(&shared.rows[owner]);
        const Vector gradient{{p.x, p.y, p.z, p.w}};
        float dh[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            const GeluAndSlope gelu = gelu_and_slope<Element>(h.get(c));
            const float normal = fmaf(gelu.value, norm.x, norm.y);
            dh[c] = gelu.slope * fmaf(normal, norm.w, gradient.get(c) + norm.z);
        }
        Vector::template store<true>(args.dh + offset + i * 8, dh, 8);
    }
}

// Few blocks of many rows read the row sums best; where there are too few to fill a GPU they take
// fewer rows, down to a sector's worth of sums.
inline int finish_rows(std::uint32_t pixels) {
    constexpr std::uint32_t kEnoughBlocks = 148 * 8;
    int rows = 32;
    while (rows > 8 && pixels / rows < kEnoughBlocks) rows /= 2;
    return rows;
}

template <class Element>
void launch_nested_conv_finish(NestedConvFinishArgs args, void* stream) {
    const std::uint32_t octets = static_cast<std::uint32_t>(args.C) / 8;
    args.rows = finish_rows(args.pixels);
    args.octet_reciprocal = ((1u << 31) + octets - 1) / octets;
    run({.kernel = "nested_conv_finish_kernel",
         .grid = dim3((args.pixels + args.rows - 1) / args.rows),
         .block = dim3(kFinishThreads),
         .shared_bytes = sizeof(NestedConvFinishShared),
         .stream = stream},
        nested_conv_finish_kernel<Element>, args);
}

}  // namespace convnest::cuda
