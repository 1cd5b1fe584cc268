// The convolutions of small maps: when they run, what they take, and their launches. 16-bit types,
// kernel sizes 3 to 13, C a multiple of 8 and every tensor 16-byte aligned.
#pragma once

#include "common/convolution_limits.h"

namespace convnest::cuda {

// Whether a convolution of this shape runs where the image is the tile (small_map.cuh). Both sides
// in positions that a channel's warps go over, filled or not. A function of the shape alone.
inline bool takes_small_map(int N, int H, int W, int kernel_size) {
    constexpr int kSide = 8, kImages = 16;
    if (N < 1 || H < 1 || W < 1 || H > kSide || W > kSide) return false;
    const auto ceil_div = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
    const std::int64_t small = ceil_div(N, kImages) * kImages * kSide * kSide;
    if (kernel_size > 9) {
        // The other way is K² products on the FMA units: 6 to 8 times the instructions of a whole
        // tile, and no sooner than this does an empty tile cost as much.
        constexpr int kFewestOutputs = 6;  // one in so many positions
        return small <= kFewestOutputs * static_cast<std::int64_t>(N) * H * W;
    }
    // The canvas at its best: virtual rows of 124 of 128 positions, one column, stages of 4 rows.
    const int radius = kernel_size / 2;
    const int fit = (124 + radius) / (W + radius), beside = fit < N ? fit : N;
    const std::int64_t rows = ceil_div(N, beside) * (H + radius);
    return small < ceil_div(rows, 4) * 4 * 128;
}

enum class MapSource { tensor, gelu_norm };

struct DepthwiseSmallArgs {
    const std::uint16_t* x;  // [N, H, W, C]; of gelu_norm: h
    std::uint16_t* y;        // [N, H, W, C]
    std::uint16_t* u;        // [N, H, W, C] or null; gelu_norm only, as the five below
    const float* mean;       // [N, H, W]
    const float* rstd;       // [N, H, W]
    const float* ln_weight;  // [C] or null
    const float* ln_bias;    // [C] or null
    bool shortcut;
    const float* weight;  // [C, K·K]
    const float* bias;    // [C] or null
    int N, H, W, C;
    int channel_blocks;  // set by the launch
};

void launch_depthwise_small(const char* name, MapSource source, DepthwiseSmallArgs args,
                            int kernel_size, ElementType type, void* stream);

struct DepthwiseSmallBwdArgs {
    const std::uint16_t* x;   // [N, H, W, C]; of gelu_norm: h
    const std::uint16_t* dy;  // [N, H, W, C]; of gelu_norm: dv
    std::uint16_t* dx;        // [N, H, W, C] or null
    const std::uint16_t* u;   // [N, H, W, C]; gelu_norm only, as the five below
    std::uint16_t* du;        // [N, H, W, C]
    const float* mean;        // [N, H, W]
    const float* rstd;        // [N, H, W]
    const float* ln_weight;   // [C] or null
    const float* ln_bias;     // [C] or null
    const float* weight;      // [C, K·K]
    float* dweight;           // [groups, C, K·K], or null: neither of the two
    float* dbias;             // [groups, C]
    int N, H, W, C;
    int groups;          // small_map_groups()
    int channel_blocks;  // set by the launch
};

// Groups of the weight gradient's partial sums.
int small_map_groups(int N, int C);

void launch_depthwise_small_bwd(const char* name, MapSource source, DepthwiseSmallBwdArgs args,
                                int kernel_size, ElementType type, void* stream);

}  // namespace convnest::cuda
