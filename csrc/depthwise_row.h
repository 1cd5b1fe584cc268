// Depthwise K x K convolution of a few image rows, one vector of channels at a time, and its
// weight gradient. Shared by nested_conv and dwconv_gelu_layernorm, forward and backward.
//
//   conv_rows      out[y,x]    = sum_{ky,kx} w[ky,kx] in[y+ky-p, x+kx-p],           p = K / 2
//   weight_rows    dw[ky,kx]  += sum_{y,x} dy[y+p-ky, x+p-kx] in[y,x]
//
// The rows of one operand come from a Ring: zero-padded by p columns on both sides, channel-blocked
// so that all rows that one vector of channels needs are one short stretch of memory. The input
// gradient of a convolution is conv_rows with the weights flipped.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace convnest::CONVNEST_ISA {

// Output columns are done in register tiles of 7 (the maps of 224-pixel images are multiples of 7)
// and of 4; what they overshoot is computed from padding and not stored.
constexpr int kLargeTile = 7;
constexpr int kSmallTile = 4;

struct TilePlan {
    std::int64_t large;
    std::int64_t small;
    std::int64_t width() const { return kLargeTile * large + kSmallTile * small; }
};

// conv_rows and weight_rows for one kernel size; `L` lanes to a vector.
//   rows[i]   input row y0 - p + i, at its first padding column; i in [begin, end) is in the image
template <class A>
struct ConvRows {
    const A* const* rows;
    std::int64_t begin, end;
    const A* weight;  // [K * K][L]
    A* out;           // out + y * out_row + x * out_pixel
    std::int64_t out_row, out_pixel;
    std::int64_t count;  // output rows y0 ... y0 + count - 1
    std::int64_t width;
    TilePlan plan;
};

template <class A>
struct WeightRows {
    const A* const* rows;  // of dy
    std::int64_t begin, end;
    const A* in;      // [count][plan.width()][L], zero from `width` on
    A* dweight_flip;  // [K * K][L]: entry K*K-1-(ky*K+kx) gains dw[ky,kx]
    std::int64_t count;
    std::int64_t width;
    TilePlan plan;
};

template <class A>
struct RowKernels {
    void (*conv_rows)(const ConvRows<A>&);
    void (*weight_rows)(const WeightRows<A>&);
};

// K is 3, 5, 7, 9, 11 or 13; the caller has checked it.
void row_kernels(int K, RowKernels<float>* kernels);
void row_kernels(int K, RowKernels<double>* kernels);

namespace {

inline TilePlan plan_tiles(std::int64_t width) {
    TilePlan best{(width + kLargeTile - 1) / kLargeTile, 0};
    // A small tile costs a little more per column: it loads K - 1 halo columns for fewer outputs.
    const auto cost = [](TilePlan plan) { return 70 * plan.large + 44 * plan.small; };
    for (std::int64_t small = 1; small < kLargeTile; ++small) {
        const std::int64_t rest = width - kSmallTile * small;
        const TilePlan plan{rest > 0 ? (rest + kLargeTile - 1) / kLargeTile : 0, small};
        if (cost(plan) < cost(best)) best = plan;
    }
    return best;
}

// Image rows in the accumulate type: row y of channel vector b is at row(b, y), with p columns of
// zeros before it and at least p after it. Rows `slots` apart share memory.
template <class A>
struct Ring {
    A* data;
    std::int64_t blocks, slots, padded, block_stride;
    int pad;
    std::int64_t width;

    static std::int64_t block_elements(std::int64_t slots, std::int64_t padded) {
        // An odd number of vectors: the same pixel in all blocks spreads over all cache sets.
        return (slots * padded | 1) * kLanes<A>;
    }
    A* row(std::int64_t block, std::int64_t y) const {
        return data + block * block_stride + (y % slots) * padded * kLanes<A>;
    }
    // All else is written before it is read.
    void clear_padding() const {
        const std::int64_t first = (pad + width) * kLanes<A>;
        for (std::int64_t b = 0; b < blocks; ++b) {
            for (std::int64_t y = 0; y < slots; ++y) {
                A* at = row(b, y);
                for (std::int64_t i = 0; i < pad * kLanes<A>; ++i) at[i] = 0;
                for (std::int64_t i = first; i < padded * kLanes<A>; ++i) at[i] = 0;
            }
        }
    }
};

}  // namespace
}  // namespace convnest::CONVNEST_ISA
