// dwconv_gelu_layernorm, backward, on CUDA devices:
//
//     1  layernorm_bwd_kernel     dc from dy and c, partials of dγ, dβ   reads dy, c; writes dc
//     2  depthwise_kernel         dx = DWᵀ(dc)                           reads dc; writes dx
//     3  depthwise_wgrad_kernel   partials of dw = Σ x·dc, db            reads x, dc
//     4  sum_partials_kernel      each parameter's gradient, in a fixed order
//
// Instances: 1: 3 element types × 3 norms × (1 or 2 vectors of a row) × vector or scalar access =
// 36; 2 and 3: 2 × kernel sizes 3, 5, 7, 9 × 2 = 16 each. Float32 and the larger kernel sizes take
// 2 and 3 on the FMA units (depthwise_fma.cu).
#include "common/convolution_limits.h"
#include "common/depthwise.cuh"
#include "common/depthwise_fma_wgrad.cuh"
#include "common/depthwise_wgrad.cuh"
#include "common/layernorm_bwd.cuh"
#include "common/plan.cuh"
#include "common/sum_partials.cuh"
#include "dwconv_gelu_layernorm_cuda.h"

namespace convnest::cuda {

namespace {

using Params = DwconvGeluLayerNormBwdParams;
using Half = std::uint16_t;

// Where everything lies in the workspace, and how the weight gradient is cut.
struct Plan {
    WgradPlan wgrad;         // on the tensor cores
    FmaWgradPlan fma_wgrad;  // or on the FMA units
    int wgrad_groups, norm_groups;
    std::size_t dc, weight_partials, bias_partials, norm_partials, bytes;
};

Plan plan_backward(int N, int H, int W, int C, int kernel_size, ElementType type) {
    const std::size_t rows = static_cast<std::size_t>(N) * H * W;
    Plan plan{};
    if (on_tensor_cores(kernel_size, type)) {
        plan.wgrad = plan_wgrad(N, H, W, C, kernel_size);
        plan.wgrad_groups = plan.wgrad.groups;
    } else {
        plan.fma_wgrad = plan_fma_wgrad(N, H, W, C, kernel_size);
        plan.wgrad_groups = plan.fma_wgrad.groups;
    }
    plan.norm_groups = plan_rows(static_cast<std::uint32_t>(rows), C).groups;
    Workspace workspace;
    plan.dc = workspace.take(rows * C * element_bytes(type));
    const std::size_t channels = sizeof(float) * plan.wgrad_groups * C;
    plan.weight_partials = workspace.take(channels * kernel_size * kernel_size);
    plan.bias_partials = workspace.take(channels);
    plan.norm_partials = workspace.take(sizeof(float) * plan.norm_groups * 2 * C);
    plan.bytes = workspace.bytes;
    return plan;
}

// A call with its plan, and what its kernels leave in the workspace.
struct Backward {
    const Params& p;
    Plan plan;
    int kernel_size;
    void* stream;
    std::uint32_t pixels;
    void* dc;
    float *weight_partials, *bias_partials, *norm_partials;

    Backward(const Params& p, int kernel_size, ElementType type, void* stream)
        : p(p),
          plan(plan_backward(p.N, p.H, p.W, p.C, kernel_size, type)),
          kernel_size(kernel_size),
          stream(stream),
          pixels(static_cast<std::uint32_t>(p.N * p.H) * p.W) {
        char* workspace = static_cast<char*>(p.workspace);
        dc = workspace + plan.dc;
        weight_partials = reinterpret_cast<float*>(workspace + plan.weight_partials);
        bias_partials = reinterpret_cast<float*>(workspace + plan.bias_partials);
        norm_partials = reinterpret_cast<float*>(workspace + plan.norm_partials);
    }

    bool wants_taps() const { return p.dconv_weight != nullptr || p.dconv_bias != nullptr; }

    // 16-byte accesses: rows of whole vectors of 8 channels, all tensors aligned.
    bool takes_vectors() const {
        return p.C % 8 == 0 && aligned(p.dy) && aligned(p.x) && aligned(p.c) && aligned(p.dx);
    }

    template <class Element, NormOrder kOrder, bool kVector>
    void norm_backward() const {
        launch_layernorm_bwd<Element, kOrder, kVector>(
            "dwconv_gelu_layernorm_norm_bwd",
            {.dy = p.dy,
             .x = p.c,
             .extra = nullptr,
             .mean = p.mean,
             .rstd = p.rstd,
             .ln_weight = p.ln_weight,
             .ln_bias = p.ln_bias,
             .dx = dc,
             .partials = p.dln_weight || p.dln_bias ? norm_partials : nullptr,
             .rows = pixels,
             .C = p.C,
             .threads_per_row = 0,
             .groups = 0},
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

    void sum_up() const {
        const auto sum = [&](float* out, const float* partials, int groups, std::size_t stride,
                             int count) {
            if (out != nullptr) launch_sum_partials({partials, out, stride, groups, count}, stream);
        };
        const int C = p.C, taps = C * kernel_size * kernel_size;
        sum(p.dconv_weight, weight_partials, plan.wgrad_groups, taps, taps);
        sum(p.dconv_bias, bias_partials, plan.wgrad_groups, C, C);
        sum(p.dln_weight, norm_partials, plan.norm_groups, 2 * C, C);
        sum(p.dln_bias, norm_partials + C, plan.norm_groups, 2 * C, C);
    }
};

template <class Element, int K, bool kVector>
void launch(const Backward& b) {
    const Params& p = b.p;
    const auto* dc = static_cast<const Half*>(b.dc);
    b.norm_backward<Element, kVector>();
    if (p.dx != nullptr) {
        launch_depthwise<Element, K, Source::tensor, kVector>(
            "dwconv_gelu_layernorm_dgrad",
            {.x = dc,
             .u = nullptr,
             .y = static_cast<Half*>(p.dx),
             .du = nullptr,
             .weight = p.conv_weight,
             .bias = nullptr,
             .flipped = true,
             .C = p.C,
             .canvas = convolution_canvas(p.N, p.H, p.W, p.C, K),
             .pixel_count = b.pixels,
             .channel_blocks = channel_blocks(p.C)},
            b.stream);
    }
    if (b.wants_taps()) {
        launch_depthwise_wgrad<Element, K, false, kVector>("dwconv_gelu_layernorm_wgrad",
                                                           {.x = static_cast<const Half*>(p.x),
                                                            .dy = dc,
                                                            .mean = nullptr,
                                                            .rstd = nullptr,
                                                            .ln_weight = nullptr,
                                                            .ln_bias = nullptr,
                                                            .dweight = b.weight_partials,
                                                            .dbias = b.bias_partials,
                                                            .C = p.C,
                                                            .canvas = b.plan.wgrad.canvas,
                                                            .pixel_count = b.pixels,
                                                            .channel_blocks = channel_blocks(p.C),
                                                            .groups = b.plan.wgrad_groups},
                                                           b.stream);
    }
    b.sum_up();
}

template <class Element, int K>
void launch(const Backward& b) {
    b.takes_vectors() ? launch<Element, K, true>(b) : launch<Element, K, false>(b);
}

template <class Element>
void launch_fma(const Backward& b, ElementType type) {
    const Params& p = b.p;
    const bool vector = b.takes_vectors();
    vector ? b.norm_backward<Element, true>() : b.norm_backward<Element, false>();
    if (p.dx != nullptr) {
        launch_depthwise_fma("dwconv_gelu_layernorm_fma_dgrad",
                             {.source = FmaSource::tensor,
                              .x = b.dc,
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
                             p.N, p.H, p.W, b.kernel_size, type, b.stream);
    }
    if (b.wants_taps()) {
        launch_depthwise_fma_wgrad("dwconv_gelu_layernorm_fma_wgrad",
                                   {.gelu_norm = false,
                                    .x = p.x,
                                    .dy = b.dc,
                                    .mean = nullptr,
                                    .rstd = nullptr,
                                    .ln_weight = nullptr,
                                    .ln_bias = nullptr,
                                    .dweight = b.weight_partials,
                                    .dbias = b.bias_partials,
                                    .vector = vector,
                                    .C = p.C,
                                    .tiles = {},
                                    .channel_blocks = 0,
                                    .groups = 0},
                                   b.plan.fma_wgrad, b.kernel_size, type, b.stream);
    }
    b.sum_up();
}

template <class Element>
void launch(const Backward& b, ElementType type) {
    if (!on_tensor_cores(b.kernel_size, type)) return launch_fma<Element>(b, type);
    switch (b.kernel_size) {
        case 3: return launch<Element, 3>(b);
        case 5: return launch<Element, 5>(b);
        case 7: return launch<Element, 7>(b);
        default: return launch<Element, 9>(b);
    }
}

}  // namespace

std::size_t dwconv_gelu_layernorm_bwd_workspace_bytes(int N, int H, int W, int C, int kernel_size,
                                                      ElementType type) {
    return plan_backward(N, H, W, C, kernel_size, type).bytes;
}

void launch_dwconv_gelu_layernorm_bwd(const DwconvGeluLayerNormBwdParams& params, int kernel_size,
                                      ElementType type, void* stream) {
    check_dwconv_gelu_layernorm(params.N, params.H, params.W, params.C, kernel_size, type);
    const Backward backward(params, kernel_size, type, stream);
    switch (type) {
        case ElementType::bfloat16: return launch<BFloat16>(backward, type);
        case ElementType::float16: return launch<Float16>(backward, type);
        case ElementType::float32: return launch_fma<Float32>(backward, type);
    }
}

}  // namespace convnest::cuda
