// dwconv_gelu_layernorm, backward, on CUDA devices:
//
//     1  layernorm_bwd_kernel     dc from dy and c, partials of dγ, dβ   reads dy, c; writes dc
//     2  depthwise_kernel         dx = DWᵀ(dc)                           reads dc; writes dx
//     3  depthwise_wgrad_kernel   partials of dw = Σ x·dc, db            reads x, dc
//     4  sum_partials_kernel      each parameter's gradient, in a fixed order
//
// Instances: 1: 3 element types × 3 norms × vector or scalar access = 18; 2: 2 × kernel sizes 3, 5,
// 7, 9 × vector or scalar = 16; 3: the same and, of vectors, with the next stage's rows on their
// way or not = 24. Float32 and the larger kernel sizes take 2 and 3 on the FMA units
// (depthwise_fma.cu). Small maps take 2 and 3 in one kernel, where the image is the tile
// (depthwise_small_bwd.cu).
#include "common/conv_backward.cuh"
#include "common/depthwise.cuh"
#include "dwconv_gelu_layernorm_cuda.h"

namespace convnest::cuda {

namespace {

using Params = DwconvGeluLayerNormBwdParams;
using Half = std::uint16_t;

struct Backward : ConvBackward<Params> {
    static constexpr int kWideTensors = 1;
    void* dc;

    Backward(const Params& p, int kernel_size, ElementType type, void* stream)
        : ConvBackward(p, kernel_size, type, stream, kWideTensors), dc(wide(0)) {}

    // 16-byte accesses: rows of whole vectors of 8 channels, all tensors aligned.
    bool takes_vectors() const {
        return p.C % 8 == 0 && aligned(p.dy) && aligned(p.x) && aligned(p.c) && aligned(p.dx);
    }

    template <class Element, NormOrder kOrder, bool kVector>
    void norm_backward() const {
        launch_layernorm_bwd<Element, kOrder, kVector>("dwconv_gelu_layernorm_norm_bwd",
                                                       {.dy = p.dy,
                                                        .x = p.c,
                                                        .extra = nullptr,
                                                        .mean = p.mean,
                                                        .rstd = p.rstd,
                                                        .ln_weight = p.ln_weight,
                                                        .ln_bias = p.ln_bias,
                                                        .dx = dc,
                                                        .partials = norm_partials(),
                                                        .rows = pixels,
                                                        .C = p.C},
                                                       stream);
    }

    template <class Element, bool kVector>
    void norm_backward() const {
        if (!p.gelu) {
            norm_backward<Element, NormOrder::norm, kVector>();
        } else if (p.norm_first) {
            norm_backward<Element, NormOrder::norm_then_gelu, kVector>();
        } else {
            norm_backward<Element, NormOrder::gelu_then_norm, kVector>();
        }
    }

    template <class Element>
    void launch_small_map() const {
        norm_backward<Element, true>();
        launch_small("dwconv_gelu_layernorm_small_bwd", MapSource::tensor, p.x, dc, p.dx, nullptr,
                     nullptr);
        sum_up(true);
    }

    template <class Element, int K, bool kVector>
    void launch() const {
        norm_backward<Element, kVector>();
        if (p.dx != nullptr) {
            launch_depthwise<Element, K, Source::tensor, kVector>(
                "dwconv_gelu_layernorm_dgrad",
                {.x = static_cast<const Half*>(dc),
                 .u = nullptr,
                 .y = static_cast<Half*>(p.dx),
                 .du = nullptr,
                 .weight = p.conv_weight,
                 .bias = nullptr,
                 .flipped = true,
                 .C = p.C,
                 .canvas = convolution_canvas(p.N, p.H, p.W, p.C, K),
                 .channel_blocks = channel_blocks(p.C)},
                stream);
        }
        launch_wgrad<Element, K, false, kVector>("dwconv_gelu_layernorm_wgrad", p.x, dc);
        sum_up();
    }

    template <class Element>
    void launch_fma(bool vector) const {
        vector ? norm_backward<Element, true>() : norm_backward<Element, false>();
        if (p.dx != nullptr) {
            launch_depthwise_fma("dwconv_gelu_layernorm_fma_dgrad",
                                 {.source = FmaSource::tensor,
                                  .x = dc,
                                  .u = nullptr,
                                  .y = p.dx,
                                  .kept = nullptr,
                                  .mean = nullptr,
                                  .rstd = nullptr,
                                  .ln_weight = nullptr,
                                  .ln_bias = nullptr,
                                  .weight = p.conv_weight,
                                  .bias = nullptr,
                                  .flipped = true,
                                  .shortcut = false,
                                  .vector = vector,
                                  .C = p.C,
                                  .tiles = {},
                                  .channel_blocks = 0,
                                  .groups = 0},
                                 p.N, p.H, p.W, kernel_size, type, stream);
        }
        launch_fma_wgrad("dwconv_gelu_layernorm_fma_wgrad", false, p.x, dc, vector);
        sum_up();
    }
};

}  // namespace

std::size_t dwconv_gelu_layernorm_bwd_workspace_bytes(int N, int H, int W, int C, int kernel_size,
                                                      ElementType type) {
    return ConvBackwardPlan(N, H, W, C, kernel_size, type, Backward::kWideTensors).bytes;
}

void launch_dwconv_gelu_layernorm_bwd(const Params& p, int kernel_size, ElementType type,
                                      void* stream) {
    check_dwconv_gelu_layernorm(p.N, p.H, p.W, p.C, kernel_size, type);
    const Backward backward(p, kernel_size, type, stream);
    const bool vector = backward.takes_vectors();
    const bool small = vector && may_be_small(p.N, p.H, p.W, kernel_size, type);
    launch_backward(backward, small, vector);
}

}  // namespace convnest::cuda
