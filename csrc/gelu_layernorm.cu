// gelu_layernorm on CUDA devices: the launches. Instances: forward 3 element types × 2 orders ×
// vector or scalar access = 12; backward the same.
#include "common/row_launch.cuh"
#include "gelu_layernorm_cuda.h"

namespace convnest::cuda {

namespace {

constexpr const char* kName = "gelu_layernorm";

template <class Element, bool kVector>
void forward(const GeluLayerNormFwdParams& p, void* stream) {
    const RowStatisticsParams params{.x = p.x,
                                     .mean = p.mean,
                                     .rstd = p.rstd,
                                     .rows = static_cast<std::uint32_t>(p.rows),
                                     .C = p.C,
                                     .eps = p.eps,
                                     .y = p.y,
                                     .ln_weight = p.ln_weight,
                                     .ln_bias = p.ln_bias};
    if (p.norm_first) {
        launch_row_statistics<Element, false, RowOutput::norm_then_gelu, kVector>(
            "gelu_layernorm_fwd", params, stream);
    } else {
        launch_row_statistics<Element, true, RowOutput::norm, kVector>("gelu_layernorm_fwd", params,
                                                                       stream);
    }
}

template <class Element, bool kVector>
void backward(const GeluLayerNormBwdParams& p, void* stream) {
    const auto rows = static_cast<std::uint32_t>(p.rows);
    const bool norm_gradients = p.dln_weight != nullptr || p.dln_bias != nullptr;
    float* partials = static_cast<float*>(p.workspace);
    const LayerNormBwdArgs args{.dy = p.dy,
                                .x = p.x,
                                .extra = nullptr,
                                .mean = p.mean,
                                .rstd = p.rstd,
                                .ln_weight = p.ln_weight,
                                .ln_bias = p.ln_bias,
                                .dx = p.dx,
                                .partials = norm_gradients ? partials : nullptr,
                                .rows = rows,
                                .C = p.C};
    if (p.norm_first) {
        launch_layernorm_bwd<Element, NormOrder::norm_then_gelu, kVector>("gelu_layernorm_bwd",
                                                                          args, stream);
    } else {
        launch_layernorm_bwd<Element, NormOrder::gelu_then_norm, kVector>("gelu_layernorm_bwd",
                                                                          args, stream);
    }
    const int blocks = row_blocks(rows);
    const auto sum = [&](float* out, const float* from) {
        if (out == nullptr) return;
        launch_sum_partials({from, out, 2 * static_cast<std::size_t>(p.C), blocks, p.C}, stream);
    };
    sum(p.dln_weight, partials);
    sum(p.dln_bias, partials + p.C);
}

}  // namespace

void launch_gelu_layernorm_fwd(const GeluLayerNormFwdParams& params, ElementType type,
                               void* stream) {
    check_rows(kName, params.rows, params.C);
    const bool vector = params.C % 8 == 0 && all_aligned(params.x, params.y);
    with_element(type, [&](auto element) {
        with_vector(vector, [&](auto is_vector) {
            forward<decltype(element), decltype(is_vector)::value>(params, stream);
        });
    });
}

std::size_t gelu_layernorm_bwd_workspace_bytes(std::int64_t rows, int C) {
    return sizeof(float) * 2 * C * row_blocks(static_cast<std::uint32_t>(rows));
}

void launch_gelu_layernorm_bwd(const GeluLayerNormBwdParams& params, ElementType type,
                               void* stream) {
    check_rows(kName, params.rows, params.C);
    const bool vector = params.C % 8 == 0 && all_aligned(params.dy, params.x, params.dx);
    with_element(type, [&](auto element) {
        with_vector(vector, [&](auto is_vector) {
            backward<decltype(element), decltype(is_vector)::value>(params, stream);
        });
    });
}

}  // namespace convnest::cuda
