// nested_conv on CUDA devices: which kernel, which tiles, and the launches. Instances of the
// forward kernel: 2 element types × kernel sizes 3, 5, 7, 9 × vector or scalar access = 16; of its
// statistics: 6. Small maps run where the image is the tile (depthwise_small.cu), float32 and the
// larger kernel sizes on the FMA units (depthwise_fma.cu).
#include "nested_conv.cuh"

#include "common/convolution_limits.h"
#include "common/depthwise_fma.cuh"
#include "common/depthwise_small.h"
#include "common/instances.cuh"
#include "common/plan.cuh"

namespace convnest::cuda {

namespace {

template <class Element, bool kVector>
void launch_statistics(const NestedConvFwdParams& p, void* stream) {
    launch_row_statistics<Element, true, RowOutput::statistics, kVector>(
        "nested_conv_statistics",
        {.x = p.h,
         .mean = p.mean,
         .rstd = p.rstd,
         .rows = static_cast<std::uint32_t>(p.N * p.H) * p.W,
         .C = p.C,
         .eps = p.eps,
         .y = nullptr,
         .ln_weight = nullptr,
         .ln_bias = nullptr},
        stream);
}

// 16-byte accesses: rows of whole vectors of 8 channels, all tensors aligned.
bool takes_vectors(const NestedConvFwdParams& p) {
    return p.C % 8 == 0 && aligned(p.h) && aligned(p.v) && aligned(p.u);
}

template <class Element, int K, bool kVector>
void launch_fwd(const NestedConvFwdParams& p, void* stream) {
    launch_statistics<Element, kVector>(p, stream);
    const int blocks = channel_blocks(p.C);
    const Canvas canvas = convolution_canvas(p.N, p.H, p.W, p.C, K);
    run({.kernel = "nested_conv_fwd_kernel",
         .grid = dim3(static_cast<unsigned>(canvas.items) * blocks),
         .block = dim3(kThreads),
         .shared_bytes = sizeof(NestedConvFwdShared<K>),
         .stream = stream},
        nested_conv_fwd_kernel<Element, K, kVector>,
        NestedConvFwdArgs{p, canvas, bottom_images(canvas), 2 * static_cast<std::uint32_t>(p.C),
                          blocks});
}

template <class Element>
void launch_small_fwd(const NestedConvFwdParams& p, int kernel_size, ElementType type,
                      void* stream) {
    launch_statistics<Element, true>(p, stream);
    launch_depthwise_small("nested_conv_small_fwd", MapSource::gelu_norm,
                           {.x = static_cast<const std::uint16_t*>(p.h),
                            .y = static_cast<std::uint16_t*>(p.v),
                            .u = static_cast<std::uint16_t*>(p.u),
                            .mean = p.mean,
                            .rstd = p.rstd,
                            .ln_weight = p.ln_weight,
                            .ln_bias = p.ln_bias,
                            .shortcut = p.shortcut,
                            .weight = p.conv_weight,
                            .bias = p.conv_bias,
                            .N = p.N,
                            .H = p.H,
                            .W = p.W,
                            .C = p.C,
                            .channel_blocks = 0},
                           kernel_size, type, stream);
}

template <class Element>
void launch_fma_fwd(const NestedConvFwdParams& p, int kernel_size, ElementType type, void* stream) {
    const bool vector = takes_vectors(p);
    vector ? launch_statistics<Element, true>(p, stream)
           : launch_statistics<Element, false>(p, stream);
    launch_depthwise_fma("nested_conv_fma_fwd",
                         {.source = FmaSource::gelu_norm,
                          .x = p.h,
                          .u = nullptr,
                          .y = p.v,
                          .kept = p.u,
                          .mean = p.mean,
                          .rstd = p.rstd,
                          .ln_weight = p.ln_weight,
                          .ln_bias = p.ln_bias,
                          .weight = p.conv_weight,
                          .bias = p.conv_bias,
                          .flipped = false,
                          .shortcut = p.shortcut,
                          .vector = vector,
                          .C = p.C,
                          .tiles = {},
                          .channel_blocks = 0,
                          .groups = 0},
                         p.N, p.H, p.W, kernel_size, type, stream);
}

}  // namespace

bool nested_conv_has_kernel_size(int kernel_size, ElementType) {
    return has_kernel_size(kernel_size);
}

void check_nested_conv(int N, int H, int W, int C, int kernel_size, ElementType) {
    check_convolution("nested_conv", N, H, W, C, kernel_size);
}

void launch_nested_conv_fwd(const NestedConvFwdParams& params, int kernel_size, ElementType type,
                            void* stream) {
    check_nested_conv(params.N, params.H, params.W, params.C, kernel_size, type);
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
