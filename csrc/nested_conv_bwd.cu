// nested_conv, backward, on CUDA devices. With du = dv ⊙ GELU'(u), z = LN(g), g = GELU(h):
//
//     1  depthwise_kernel         du, dz = DWᵀ(du)                 reads u, dv; writes du, dz
//     2  depthwise_wgrad_kernel   partials of dw = Σ z·du, db      reads h, du
//     3  layernorm_bwd_kernel     dh = GELU'(h) ⊙ (LN'(dz) [+ du]), partials of dγ, dβ
//                                                                  reads dz, h, du; writes dh
//     4  sum_partials_kernel      each parameter's gradient, in a fixed order
//
// Ten passes over wide tensors. Instances: 1 and 2: 2 element types × kernel sizes 3, 5, 7, 9 ×
// vector or scalar access = 16 each; 3: 2 × 2 × (1 or 2 vectors of a row) = 8.
#include <stdexcept>
#include <string>

#include "common/depthwise.cuh"
#include "common/depthwise_wgrad.cuh"
#include "common/layernorm_bwd.cuh"
#include "common/sum_partials.cuh"
#include "nested_conv_cuda.h"

namespace convnest::cuda {

namespace {

// As in nested_conv.cu; the weight gradient's blocks stay, two for each SM of the largest GPUs,
// and its items are a few to a block, so that blocks end together.
constexpr int kWantedBlocks = 2048;
constexpr int kPersistentBlocks = 2 * 148;
constexpr int kItemsPerBlock = 4;

bool aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

// Where everything lies in the workspace, and how the weight gradient is cut.
struct Plan {
    Canvas canvas, wgrad_canvas;
    int channel_blocks, wgrad_groups, norm_groups;
    std::size_t du, dz, weight_partials, bias_partials, norm_partials, bytes;
};

Plan plan_backward(int N, int H, int W, int C, int kernel_size) {
    Plan plan{};
    plan.channel_blocks = ceil_div(C, kBlockChannels);
    plan.canvas =
        plan_canvas(N, H, W, kernel_size / 2, ceil_div(kWantedBlocks, plan.channel_blocks));
    const int groups = ceil_div(kPersistentBlocks, plan.channel_blocks);
    plan.wgrad_canvas = plan_canvas(N, H, W, kernel_size / 2, groups * kItemsPerBlock);
    plan.wgrad_groups = groups < plan.wgrad_canvas.items ? groups : plan.wgrad_canvas.items;
    const std::size_t rows = static_cast<std::size_t>(N) * H * W;
    plan.norm_groups = plan_rows(static_cast<std::uint32_t>(rows), C).groups;
    const auto take = [&](std::size_t bytes) {
        const std::size_t offset = plan.bytes;
        plan.bytes += (bytes + 15) / 16 * 16;
        return offset;
    };
    plan.du = take(rows * C * 2);
    plan.dz = take(rows * C * 2);
    plan.weight_partials = take(sizeof(float) * plan.wgrad_groups * C * kernel_size * kernel_size);
    plan.bias_partials = take(sizeof(float) * plan.wgrad_groups * C);
    plan.norm_partials = take(sizeof(float) * plan.norm_groups * 2 * C);
    return plan;
}

template <class Element, int K, bool kVector>
void launch(const NestedConvBwdParams& p, void* stream) {
    using Half = std::uint16_t;
    const Plan plan = plan_backward(p.N, p.H, p.W, p.C, K);
    char* workspace = static_cast<char*>(p.workspace);
    Half* du = reinterpret_cast<Half*>(workspace + plan.du);
    Half* dz = reinterpret_cast<Half*>(workspace + plan.dz);
    float* weight_partials = reinterpret_cast<float*>(workspace + plan.weight_partials);
    float* bias_partials = reinterpret_cast<float*>(workspace + plan.bias_partials);
    float* norm_partials = reinterpret_cast<float*>(workspace + plan.norm_partials);
    const auto pixels = static_cast<std::uint32_t>(p.N * p.H) * p.W;
    const bool norm_gradients = p.dln_weight != nullptr || p.dln_bias != nullptr;

    launch_depthwise<Element, K, Source::gelu_gradient, kVector>(
        "nested_conv_dgrad",
        {.x = static_cast<const Half*>(p.dv),
         .u = static_cast<const Half*>(p.u),
         .y = dz,
         .du = du,
         .weight = p.conv_weight,
         .bias = nullptr,
         .flipped = true,
         .C = p.C,
         .canvas = plan.canvas,
         .pixel_count = pixels,
         .channel_blocks = plan.channel_blocks},
        stream);
    if (p.dconv_weight != nullptr || p.dconv_bias != nullptr) {
        launch_depthwise_wgrad<Element, K, true, kVector>("nested_conv_wgrad",
                                                          {.x = static_cast<const Half*>(p.h),
                                                           .dy = du,
                                                           .mean = p.mean,
                                                           .rstd = p.rstd,
                                                           .ln_weight = p.ln_weight,
                                                           .ln_bias = p.ln_bias,
                                                           .dweight = weight_partials,
                                                           .dbias = bias_partials,
                                                           .C = p.C,
                                                           .canvas = plan.wgrad_canvas,
                                                           .pixel_count = pixels,
                                                           .channel_blocks = plan.channel_blocks,
                                                           .groups = plan.wgrad_groups},
                                                          stream);
    }
    if (p.dh != nullptr || norm_gradients) {
        launch_layernorm_bwd<Element, NormOrder::gelu_then_norm, kVector>(
            "nested_conv_finish",
            {.dy = dz,
             .x = static_cast<const Half*>(p.h),
             .extra = p.shortcut ? du : nullptr,
             .mean = p.mean,
             .rstd = p.rstd,
             .ln_weight = p.ln_weight,
             .ln_bias = nullptr,
             .dx = static_cast<Half*>(p.dh),
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
    const int C = p.C, taps = C * K * K;
    sum(p.dconv_weight, weight_partials, plan.wgrad_groups, taps, taps);
    sum(p.dconv_bias, bias_partials, plan.wgrad_groups, C, C);
    sum(p.dln_weight, norm_partials, plan.norm_groups, 2 * C, C);
    sum(p.dln_bias, norm_partials + C, plan.norm_groups, 2 * C, C);
}

template <class Element, int K>
void launch(const NestedConvBwdParams& p, void* stream) {
    if (p.C % 8 == 0 && aligned(p.dv) && aligned(p.h) && aligned(p.u) && aligned(p.dh)) {
        launch<Element, K, true>(p, stream);
    } else {
        launch<Element, K, false>(p, stream);
    }
}

template <class Element>
void launch(const NestedConvBwdParams& p, int kernel_size, void* stream) {
    switch (kernel_size) {
        case 3: return launch<Element, 3>(p, stream);
        case 5: return launch<Element, 5>(p, stream);
        case 7: return launch<Element, 7>(p, stream);
        default: return launch<Element, 9>(p, stream);
    }
}

}  // namespace

std::size_t nested_conv_bwd_workspace_bytes(int N, int H, int W, int C, int kernel_size) {
    return plan_backward(N, H, W, C, kernel_size).bytes;
}

void launch_nested_conv_bwd(const NestedConvBwdParams& params, int kernel_size, ElementType type,
                            void* stream) {
    check_nested_conv(params.N, params.H, params.W, params.C, kernel_size);
    if (type == ElementType::bfloat16) {
        launch<BFloat16>(params, kernel_size, stream);
    } else {
        launch<Float16>(params, kernel_size, stream);
    }
}

}  // namespace convnest::cuda
