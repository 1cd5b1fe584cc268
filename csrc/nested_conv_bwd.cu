// nested_conv, backward, on CUDA devices. Where it fits, in two wide kernels
// (nested_conv_bwd_fused); else, with du = dv ⊙ GELU'(u), z = LN(g), g = GELU(h), in three:
//
//     1  depthwise_kernel         du, dz = DWᵀ(du)                 reads u, dv; writes du, dz
//     2  depthwise_wgrad_kernel   partials of dw = Σ z·du, db      reads h, du
//     3  layernorm_bwd_kernel     dh = GELU'(h) ⊙ (LN'(dz) [+ du]), partials of dγ, dβ
//                                                                  reads dz, h, du; writes dh
//     4  sum_partials_kernel      each parameter's gradient, in a fixed order
//
// Ten passes over wide tensors. Instances: 1 and 2: 2 element types × kernel sizes 3, 5, 7, 9 ×
// vector or scalar access = 16 each; 3: 3 × 2 = 6. Float32 and the larger kernel sizes take 1 and 2
// on the FMA units (depthwise_fma.cu). Small maps take 1 and 2 in one kernel, where the image is
// the tile (depthwise_small_bwd.cu): nine passes, and by prediction less time than two kernels on a
// canvas half full.
#include "common/conv_backward.cuh"
#include "common/depthwise.cuh"
#include "nested_conv_bwd_fused.h"

namespace convnest::cuda {

namespace {

using Half = std::uint16_t;

struct Backward : ConvBackward<NestedConvBwdParams> {
    static constexpr int kWideTensors = 2;
    void *du, *dz;

    Backward(const NestedConvBwdParams& p, int kernel_size, ElementType type, void* stream)
        : ConvBackward(p, kernel_size, type, stream, kWideTensors), du(wide(0)), dz(wide(1)) {}

    template <class Element, bool kVector>
    void finish(bool small = false) const {
        if (p.dh != nullptr || norm_partials() != nullptr) {
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
                 .partials = norm_partials(),
                 .rows = pixels,
                 .C = p.C},
                stream);
        }
        sum_up(small);
    }

    template <class Element>
    void launch_small_map() const {
        launch_small("nested_conv_small_bwd", MapSource::gelu_norm, p.h, p.dv, dz, p.u, du);
        finish<Element, true>(true);
    }

    template <class Element, int K, bool kVector>
    void launch() const {
        launch_depthwise<Element, K, Source::gelu_gradient, kVector>(
            "nested_conv_dgrad",
            {.x = static_cast<const Half*>(p.dv),
             .u = static_cast<const Half*>(p.u),
             .y = static_cast<Half*>(dz),
             .du = static_cast<Half*>(du),
             .weight = p.conv_weight,
             .bias = nullptr,
             .flipped = true,
             .C = p.C,
             .canvas = convolution_canvas(p.N, p.H, p.W, p.C, K),
             .channel_blocks = channel_blocks(p.C)},
            stream);
        launch_wgrad<Element, K, true, kVector>("nested_conv_wgrad", p.h, du);
        finish<Element, kVector>();
    }

    template <class Element>
    void launch_fma(bool vector) const {
        launch_depthwise_fma("nested_conv_fma_dgrad",
                             {.source = FmaSource::gelu_gradient,
                              .x = p.dv,
                              .u = p.u,
                              .y = dz,
                              .kept = du,
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
        launch_fma_wgrad("nested_conv_fma_wgrad", true, p.h, du, vector);
        vector ? finish<Element, true>() : finish<Element, false>();
    }
};

// 16-byte accesses: rows of whole vectors of 8 channels, all tensors aligned.
bool takes_vectors(const NestedConvBwdParams& p) {
    return p.C % 8 == 0 && aligned(p.dv) && aligned(p.h) && aligned(p.u) && aligned(p.dh);
}

bool takes_small_map(const NestedConvBwdParams& p, int kernel_size, ElementType type) {
    return takes_vectors(p) && may_be_small(p.N, p.H, p.W, kernel_size, type);
}

bool takes_two_kernels(const NestedConvBwdParams& p, int kernel_size, ElementType type) {
    return on_tensor_cores(kernel_size, type) && takes_vectors(p) &&
           !takes_small_map(p, kernel_size, type) &&
           fuses_nested_conv_bwd(kernel_size, device_shared_bytes());
}

}  // namespace

std::size_t nested_conv_bwd_workspace_bytes(const NestedConvBwdParams& p, int kernel_size,
                                            ElementType type) {
    if (takes_two_kernels(p, kernel_size, type)) {
        return nested_conv_bwd_fused_workspace_bytes(p, kernel_size);
    }
    return ConvBackwardPlan(p.N, p.H, p.W, p.C, kernel_size, type, Backward::kWideTensors).bytes;
}

void launch_nested_conv_bwd(const NestedConvBwdParams& p, int kernel_size, ElementType type,
                            void* stream) {
    check_nested_conv(p.N, p.H, p.W, p.C, kernel_size, type);
    if (takes_two_kernels(p, kernel_size, type)) {
        return launch_nested_conv_bwd_fused(p, kernel_size, type, stream);
    }
    const Backward backward(p, kernel_size, type, stream);
    const bool vector = takes_vectors(p), small = takes_small_map(p, kernel_size, type);
    launch_backward(backward, small, vector);
}

}  // namespace convnest::cuda
