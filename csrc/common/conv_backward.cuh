// What the backwards of the convolution operators share: the cut of the weight gradient, the
// workspace, the sums at the end, and the launch.
#pragma once

#include "common/convolution_limits.h"
#include "common/depthwise_fma_wgrad.cuh"
#include "common/depthwise_small.h"
#include "common/depthwise_wgrad.cuh"
#include "common/instances.cuh"
#include "common/layernorm_bwd.cuh"
#include "common/plan.cuh"
#include "common/sum_partials.cuh"

namespace convnest::cuda {

// Partial sums of the parameters' gradients in a workspace: of dw [tap_groups, C, K·K], db
// [tap_groups, C], and dγ, dβ [norm_groups, 2, C].
struct ParameterPartials {
    int C, taps, tap_groups, norm_groups;
    std::size_t weight, bias, norm;  // offsets

    ParameterPartials(Workspace& workspace, int C, int kernel_size, int tap_groups, int norm_groups)
        : C(C),
          taps(kernel_size * kernel_size),
          tap_groups(tap_groups),
          norm_groups(norm_groups),
          weight(workspace.take(floats(tap_groups) * taps)),
          bias(workspace.take(floats(tap_groups))),
          norm(workspace.take(floats(norm_groups) * 2)) {}

    // Adds them up, into the gradients that are wanted.
    template <class Params>
    void sum_up(const Params& p, void* stream) const {
        const auto sum = [&](float* out, std::size_t offset, int groups, int stride, int count) {
            if (out == nullptr) return;
            const auto* partials =
                reinterpret_cast<const float*>(static_cast<const char*>(p.workspace) + offset);
            launch_sum_partials({partials, out, static_cast<std::size_t>(stride), groups, count},
                                stream);
        };
        sum(p.dconv_weight, weight, tap_groups, C * taps, C * taps);
        sum(p.dconv_bias, bias, tap_groups, C, C);
        sum(p.dln_weight, norm, norm_groups, 2 * C, C);
        sum(p.dln_bias, norm + sizeof(float) * C, norm_groups, 2 * C, C);
    }

  private:
    std::size_t floats(int groups) const {
        return sizeof(float) * static_cast<std::size_t>(groups) * C;
    }
};

inline bool may_be_small(int N, int H, int W, int kernel_size, ElementType type) {
    return type != ElementType::float32 && takes_small_map(N, H, W, kernel_size);
}

// How the weight gradient is cut, and where everything lies in the workspace: wide tensors (of the
// activations' shape and type) first.
struct ConvBackwardPlan {
    WgradPlan wgrad{};         // on the tensor cores
    FmaWgradPlan fma_wgrad{};  // or on the FMA units
    std::size_t wide_bytes, bytes;
    ParameterPartials partials;

    ConvBackwardPlan(int N, int H, int W, int C, int kernel_size, ElementType type,
                     int wide_tensors)
        : wide_bytes((static_cast<std::size_t>(N) * H * W * C * element_bytes(type) + 15) / 16 *
                     16),
          bytes(wide_bytes * wide_tensors),
          partials(plan(N, H, W, C, kernel_size, type)) {}

  private:
    ParameterPartials plan(int N, int H, int W, int C, int kernel_size, ElementType type) {
        int groups;
        if (on_tensor_cores(kernel_size, type)) {
            wgrad = plan_wgrad(N, H, W, C, kernel_size);
            groups = wgrad.groups;
        } else {
            fma_wgrad = plan_fma_wgrad(N, H, W, C, kernel_size);
            groups = fma_wgrad.groups;
        }
        // Room for either way: pointers that allow no vectors send a small map the other one.
        if (may_be_small(N, H, W, kernel_size, type)) {
            const int small_groups = small_map_groups(N, C);
            groups = small_groups > groups ? small_groups : groups;
        }
        const int norm_groups = row_blocks(static_cast<std::uint32_t>(N * H) * W);
        Workspace workspace{bytes};
        const ParameterPartials placed(workspace, C, kernel_size, groups, norm_groups);
        bytes = workspace.bytes;
        return placed;
    }
};

// A backward with its plan, and what its kernels leave in the workspace.
template <class Params>
struct ConvBackward {
    const Params& p;
    int kernel_size;
    ElementType type;
    void* stream;
    ConvBackwardPlan plan;
    std::uint32_t pixels;

    ConvBackward(const Params& p, int kernel_size, ElementType type, void* stream, int wide_tensors)
        : p(p),
          kernel_size(kernel_size),
          type(type),
          stream(stream),
          plan(p.N, p.H, p.W, p.C, kernel_size, type, wide_tensors),
          pixels(static_cast<std::uint32_t>(p.N * p.H) * p.W) {}

    void* wide(int i) const { return static_cast<char*>(p.workspace) + i * plan.wide_bytes; }
    float* partials(std::size_t offset) const {
        return reinterpret_cast<float*>(static_cast<char*>(p.workspace) + offset);
    }
    float* norm_partials() const {
        return p.dln_weight || p.dln_bias ? partials(plan.partials.norm) : nullptr;
    }

    // The weight gradient's partial sums, from x (normed on the way if kGeluNorm) and dy.
    template <class Element, int K, bool kGeluNorm, bool kVector>
    void launch_wgrad(const char* name, const void* x, const void* dy) const {
        if (p.dconv_weight == nullptr && p.dconv_bias == nullptr) return;
        launch_depthwise_wgrad<Element, K, kGeluNorm, kVector>(
            name,
            {.x = static_cast<const std::uint16_t*>(x),
             .dy = static_cast<const std::uint16_t*>(dy),
             .mean = p.mean,
             .rstd = p.rstd,
             .ln_weight = p.ln_weight,
             .ln_bias = p.ln_bias,
             .dweight = partials(plan.partials.weight),
             .dbias = partials(plan.partials.bias),
             .C = p.C,
             .canvas = plan.wgrad.canvas,
             .channel_blocks = channel_blocks(p.C),
             .groups = plan.wgrad.groups},
            stream);
    }

    void launch_fma_wgrad(const char* name, bool gelu_norm, const void* x, const void* dy,
                          bool vector) const {
        if (p.dconv_weight == nullptr && p.dconv_bias == nullptr) return;
        launch_depthwise_fma_wgrad(name,
                                   {.gelu_norm = gelu_norm,
                                    .x = x,
                                    .dy = dy,
                                    .mean = p.mean,
                                    .rstd = p.rstd,
                                    .ln_weight = p.ln_weight,
                                    .ln_bias = p.ln_bias,
                                    .dweight = partials(plan.partials.weight),
                                    .dbias = partials(plan.partials.bias),
                                    .vector = vector,
                                    .C = p.C,
                                    .tiles = {},
                                    .channel_blocks = 0,
                                    .groups = 0},
                                   plan.fma_wgrad, kernel_size, type, stream);
    }

    // Both gradients of the convolution on a small map, from x and dy; `u` and `du`: of gelu_norm.
    void launch_small(const char* name, MapSource source, const void* x, const void* dy, void* dx,
                      const void* u, void* du) const {
        const bool taps = p.dconv_weight != nullptr || p.dconv_bias != nullptr;
        if (dx == nullptr && !taps) return;
        launch_depthwise_small_bwd(name, source,
                                   {.x = static_cast<const std::uint16_t*>(x),
                                    .dy = static_cast<const std::uint16_t*>(dy),
                                    .dx = static_cast<std::uint16_t*>(dx),
                                    .u = static_cast<const std::uint16_t*>(u),
                                    .du = static_cast<std::uint16_t*>(du),
                                    .mean = p.mean,
                                    .rstd = p.rstd,
                                    .ln_weight = p.ln_weight,
                                    .ln_bias = p.ln_bias,
                                    .weight = p.conv_weight,
                                    .dweight = taps ? partials(plan.partials.weight) : nullptr,
                                    .dbias = partials(plan.partials.bias),
                                    .N = p.N,
                                    .H = p.H,
                                    .W = p.W,
                                    .C = p.C,
                                    .groups = small_map_groups(p.N, p.C),
                                    .channel_blocks = 0},
                                   kernel_size, type, stream);
    }

    // `small`: after launch_small.
    void sum_up(bool small = false) const {
        ParameterPartials written = plan.partials;
        if (small) {
            written.tap_groups = small_map_groups(p.N, p.C);
        } else if (on_tensor_cores(kernel_size, type)) {
            written.tap_groups = plan.wgrad.groups;
        } else {
            written.tap_groups = plan.fma_wgrad.groups;
        }
        written.sum_up(p, stream);
    }
};

// A stem's backward (a ConvBackward with a launch for each way), the way that its call goes.
template <class Backward>
void launch_backward(const Backward& backward, bool small, bool vector) {
    with_way(
        backward.type, backward.kernel_size, small, vector,
        [&](auto element) { backward.template launch_small_map<decltype(element)>(); },
        [&](auto element, auto K, auto is_vector) {
            backward.template launch<decltype(element), K(), is_vector()>();
        },
        [&](auto element) { backward.template launch_fma<decltype(element)>(vector); });
}

}  // namespace convnest::cuda
