// dwconv_gelu_layernorm, forward, on CUDA devices:
//
//     1  depthwise_kernel        c = DW(x) + conv_bias        reads x; writes c
//     2  row_statistics_kernel   y = LN(act(c)) or act(LN(c))  reads c; writes y, mean, rstd
//
// c is rounded to the activations' type before the norm (docs/math.md). Instances: 1: 2 element
// types × kernel sizes 3, 5, 7, 9 × vector or scalar access = 16; 2: 3 × 3 norms × 2 = 18. Small
// maps take 1 where the image is the tile (depthwise_small.cu), float32 and the larger kernel sizes
// on the FMA units (depthwise_fma.cu).
#include "common/convolution_limits.h"
#include "common/depthwise.cuh"
#include "common/depthwise_fma.cuh"
#include "common/depthwise_small.h"
#include "common/instances.cuh"
#include "common/plan.cuh"
#include "common/row_statistics.cuh"
#include "dwconv_gelu_layernorm_cuda.h"

namespace convnest::cuda {

namespace {

using Params = DwconvGeluLayerNormFwdParams;

template <class Element, bool kGelu, RowOutput kOutput, bool kVector>
void normalize(const Params& p, void* stream) {
    launch_row_statistics<Element, kGelu, kOutput, kVector>(
        "dwconv_gelu_layernorm_norm",
        {.x = p.c,
         .mean = p.mean,
         .rstd = p.rstd,
         .rows = static_cast<std::uint32_t>(p.N * p.H) * p.W,
         .C = p.C,
         .eps = p.eps,
         .y = p.y,
         .ln_weight = p.ln_weight,
         .ln_bias = p.ln_bias},
        stream);
}

template <class Element, bool kVector>
void normalize(const Params& p, void* stream) {
    if (!p.gelu) {
        normalize<Element, false, RowOutput::norm, kVector>(p, stream);
    } else if (p.norm_first) {
        normalize<Element, false, RowOutput::norm_then_gelu, kVector>(p, stream);
    } else {
        normalize<Element, true, RowOutput::norm, kVector>(p, stream);
    }
}

template <class Element, int K, bool kVector>
void launch_fwd(const Params& p, void* stream) {
    launch_depthwise<Element, K, Source::tensor, kVector>(
        "dwconv_gelu_layernorm_fwd",
        {.x = static_cast<const std::uint16_t*>(p.x),
         .u = nullptr,
         .y = static_cast<std::uint16_t*>(p.c),
         .du = nullptr,
         .weight = p.conv_weight,
         .bias = p.conv_bias,
         .flipped = false,
         .C = p.C,
         .canvas = convolution_canvas(p.N, p.H, p.W, p.C, K),
         .channel_blocks = channel_blocks(p.C)},
        stream);
    normalize<Element, kVector>(p, stream);
}

// 16-byte accesses: rows of whole vectors of 8 channels, all tensors aligned.
bool takes_vectors(const Params& p) {
    return p.C % 8 == 0 && aligned(p.x) && aligned(p.c) && aligned(p.y);
}

template <class Element>
void launch_small_fwd(const Params& p, int kernel_size, ElementType type, void* stream) {
    launch_depthwise_small("dwconv_gelu_layernorm_small_fwd", MapSource::tensor,
                           {.x = static_cast<const std::uint16_t*>(p.x),
                            .y = static_cast<std::uint16_t*>(p.c),
                            .u = nullptr,
                            .mean = nullptr,
                            .rstd = nullptr,
                            .ln_weight = nullptr,
                            .ln_bias = nullptr,
                            .shortcut = false,
                            .weight = p.conv_weight,
                            .bias = p.conv_bias,
                            .N = p.N,
                            .H = p.H,
                            .W = p.W,
                            .C = p.C,
                            .channel_blocks = 0},
                           kernel_size, type, stream);
    normalize<Element, true>(p, stream);
}

template <class Element>
void launch_fma_fwd(const Params& p, int kernel_size, ElementType type, void* stream) {
    const bool vector = takes_vectors(p);
    launch_depthwise_fma("dwconv_gelu_layernorm_fma_fwd",
                         {.source = FmaSource::tensor,
                          .x = p.x,
                          .u = nullptr,
                          .y = p.c,
                          .kept = nullptr,
                          .mean = nullptr,
                          .rstd = nullptr,
                          .ln_weight = nullptr,
                          .ln_bias = nullptr,
                          .weight = p.conv_weight,
                          .bias = p.conv_bias,
                          .flipped = false,
                          .shortcut = false,
                          .vector = vector,
                          .C = p.C,
                          .tiles = {},
                          .channel_blocks = 0,
                          .groups = 0},
                         p.N, p.H, p.W, kernel_size, type, stream);
    vector ? normalize<Element, true>(p, stream) : normalize<Element, false>(p, stream);
}

}  // namespace

bool dwconv_gelu_layernorm_has_kernel_size(int kernel_size, ElementType) {
    return has_kernel_size(kernel_size);
}

void check_dwconv_gelu_layernorm(int N, int H, int W, int C, int kernel_size, ElementType) {
    check_convolution("dwconv_gelu_layernorm", N, H, W, C, kernel_size);
}

void launch_dwconv_gelu_layernorm_fwd(const DwconvGeluLayerNormFwdParams& params, int kernel_size,
                                      ElementType type, void* stream) {
    check_dwconv_gelu_layernorm(params.N, params.H, params.W, params.C, kernel_size, type);
    const bool vector = takes_vectors(params);
    const bool small = vector && takes_small_map(params.N, params.H, params.W, kernel_size);
    with_way(
        type, kernel_size, small, vector,
        [&](auto element) {
            launch_small_fwd<decltype(element)>(params, kernel_size, type, stream);
        },
        [&](auto element, auto K, auto is_vector) {
            launch_fwd<decltype(element), K(), is_vector()>(params, stream);
        },
        [&](auto element) {
            launch_fma_fwd<decltype(element)>(params, kernel_size, type, stream);
        });
}

}  // namespace convnest::cuda
