// nested_conv, backward, on CUDA devices. With du = dv ⊙ GELU'(u), z = LN(g), g = GELU(h):
//
//     1  depthwise_kernel         du, dz = DWᵀ(du)                 reads u, dv; writes du, dz
//     2  depthwise_wgrad_kernel   partials of dw = Σ z·du, db      reads h, du
//     3  layernorm_bwd_kernel     dh = GELU'(h) ⊙ (LN'(dz) [+ du]), partials of dγ, dβ
//                                                                  reads dz, h, du; writes dh
//     4  sum_partials_kernel      each parameter's gradient, in a fixed order
//
// Ten passes over wide tensors. Instances: 1 and 2: 2 element types × kernel sizes 3, 5, 7, 9 ×
// vector or scalar access = 16 each; 3: 3 × 2 × (1 or 2 vectors of a row) = 12. Float32 and the
// larger kernel sizes take 1 and 2 on the FMA units (depthwise_fma.cu).
#include "common/convolution_limits.h"
#include "common/depthwise.cuh"
#include "common/depthwise_fma_wgrad.cuh"
#include "common/depthwise_wgrad.cuh"
#include "common/layernorm_bwd.cuh"
#include "common/plan.cuh"
#include "common/sum_partials.cuh"
#include "nested_conv_cuda.h"

namespace convnest::cuda {

namespace {

using Half = std::uint16_t;

// Where everything lies in the workspace, and how the weight gradient is cut.
struct Plan {
    WgradPlan wgrad;         // on the tensor cores
    FmaWgradPlan fma_wgrad;  // or on the FMA units
    int wgrad_groups, norm_groups;
    std::size_t du, dz, weight_partials, bias_partials, norm_partials, bytes;
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
    plan.du = workspace.take(rows * C * element_bytes(type));
    plan.dz = workspace.take(rows * C * element_bytes(type));
    const std::size_t channels = sizeof(float) * plan.wgrad_groups * C;
    plan.weight_partials = workspace.take(channels * kernel_size * kernel_size);
    plan.bias_partials = workspace.take(channels);
    plan.norm_partials = workspace.take(sizeof(float) * plan.norm_groups * 2 * C);
    plan.bytes = workspace.bytes;
    return plan;
}

// A call with its plan, and what its kernels leave in the workspace.
struct Backward {
    const NestedConvBwdParams& p;
    Plan plan;
    int kernel_size;
    void* stream;
    std::uint32_t pixels;
    void *du, *dz;
    float *weight_partials, *bias_partials, *norm_partials;

    Backward(const NestedConvBwdParams& p, int kernel_size, ElementType type, void* stream)
        : p(p),
          plan(plan_backward(p.N, p.H, p.W, p.C, kernel_size, type)),
          kernel_size(kernel_size),
          stream(stream),
          pixels(static_cast<std::uint32_t>(p.N * p.H) * p.W) {
        char* workspace = static_cast<char*>(p.workspace);
        du = workspace + plan.du;
        dz = workspace + plan.dz;
        weight_partials = reinterpret_cast<float*>(workspace + plan.weight_partials);
        bias_partials = reinterpret_cast<float*>(workspace + plan.bias_partials);
        norm_partials = reinterpret_cast<float*>(workspace + plan.norm_partials);
    }

    bool wants_taps() const { return p.dconv_weight != nullptr || p.dconv_bias != nullptr; }

    // 16-byte accesses: rows of whole vectors of 8 channels, all tensors aligned.
    bool takes_vectors() const {
        return p.C % 8 == 0 && aligned(p.dv) && aligned(p.h) && aligned(p.u) && aligned(p.dh);
    }

    template <class Element, bool kVector>
    void finish() const {
        const bool norm_gradients = p.dln_weight != nullptr || p.dln_bias != nullptr;
        if (p.dh != nullptr || norm_gradients) {
            launch_layernorm_bwd<Element, NormOrder::gelu_then_norm, kVector>(
                "nested_conv_finish",
                {.dy = dz,
                 .x = p.h,
                 .extra = p.shortcut ? du : nullptr,
                 .mean = p.mean,
                 .rstd = p.rstd,
                 .ln_weight = p.ln_weight,
                 .ln_bias = nullptr,
                 .dx = p.dh,
                 .partials = norm_gradients ? norm_partials : nullptr,
                 .rows = pixels,
                 .C = p.C,
                 .threads_per_row = 0,
                 .groups = 0},
                stream);
        }
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
    const NestedConvBwdParams& p = b.p;
    launch_depthwise<Element, K, Source::gelu_gradient, kVector>(
        "nested_conv_dgrad",
        {.x = static_cast<const Half*>(p.dv),
         .u = static_cast<const Half*>(p.u),
         .y = static_cast<Half*>(b.dz),
         .du = static_cast<Half*>(b.du),
         .weight = p.conv_weight,
         .bias = nullptr,
         .flipped = true,
         .C = p.C,
         .canvas = convolution_canvas(p.N, p.H, p.W, p.C, K),
         .pixel_count = b.pixels,
         .channel_blocks = channel_blocks(p.C)},
        b.stream);
    if (b.wants_taps()) {
        launch_depthwise_wgrad<Element, K, true, kVector>("nested_conv_wgrad",
                                                          {.x = static_cast<const Half*>(p.h),
                                                           .dy = static_cast<const Half*>(b.du),
                                                           .mean = p.mean,
                                                           .rstd = p.rstd,
                                                           .ln_weight = p.ln_weight,
                                                           .ln_bias = p.ln_bias,
                                                           .dweight = b.weight_partials,
                                                           .dbias = b.bias_partials,
                                                           .C = p.C,
                                                           .canvas = b.plan.wgrad.canvas,
                                                           .pixel_count = b.pixels,
                                                           .channel_blocks = channel_blocks(p.C),
                                                           .groups = b.plan.wgrad_groups},
                                                          b.stream);
    }
    b.finish<Element, kVector>();
}

template <class Element, int K>
void launch(const Backward& b) {
    b.takes_vectors() ? launch<Element, K, true>(b) : launch<Element, K, false>(b);
}

template <class Element>
void launch_fma(const Backward& b, ElementType type) {
    const NestedConvBwdParams& p = b.p;
    const bool vector = b.takes_vectors();
    launch_depthwise_fma("nested_conv_fma_dgrad",
                         {.source = FmaSource::gelu_gradient,
                          .x = p.dv,
                          .u = p.u,
                          .y = b.dz,
                          .kept = b.du,
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
    if (b.wants_taps()) {
        launch_depthwise_fma_wgrad("nested_conv_fma_wgrad",
                                   {.gelu_norm = true,
                                    .x = p.h,
                                    .dy = b.du,
                                    .mean = p.mean,
                                    .rstd = p.rstd,
                                    .ln_weight = p.ln_weight,
                                    .ln_bias = p.ln_bias,
                                    .dweight = b.weight_partials,
                                    .dbias = b.bias_partials,
                                    .vector = vector,
                                    .C = p.C,
                                    .tiles = {},
                                    .channel_blocks = 0,
                                    .groups = 0},
                                   b.plan.fma_wgrad, b.kernel_size, type, b.stream);
    }
    vector ? b.finish<Element, true>() : b.finish<Element, false>();
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

std::size_t nested_conv_bwd_workspace_bytes(int N, int H, int W, int C, int kernel_size,
                                            ElementType type) {
    return plan_backward(N, H, W, C, kernel_size, type).bytes;
}

void launch_nested_conv_bwd(const NestedConvBwdParams& params, int kernel_size, ElementType type,
                            void* stream) {
    check_nested_conv(params.N, params.H, params.W, params.C, kernel_size, type);
    const Backward backward(params, kernel_size, type, stream);
    switch (type) {
        case ElementType::bfloat16: return launch<BFloat16>(backward, type);
        case ElementType::float16: return launch<Float16>(backward, type);
        case ElementType::float32: return launch_fma<Float32>(backward, type);
    }
}

}  // namespace convnest::cuda
