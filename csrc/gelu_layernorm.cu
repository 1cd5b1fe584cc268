// gelu_layernorm on CUDA devices: the launches. Instances: forward 3 element types × 2 orders ×
// vector or scalar access = 12; backward the same × (1 or 2 vectors of a row) = 24.
#include <stdexcept>
#include <string>

#include "common/layernorm_bwd.cuh"
#include "common/row_statistics.cuh"
#include "common/sum_partials.cuh"
#include "gelu_layernorm_cuda.h"

namespace convnest::cuda {

namespace {

bool aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

void check_rows(std::int64_t rows) {
    if (rows >= std::int64_t{1} << 31) {
        throw std::invalid_argument("gelu_layernorm: rows must be below 2^31, got " +
                                    std::to_string(rows));
    }
}

template <class Element, bool kVector>
void forward(const GeluLayerNormFwdParams& p, void* stream) {
    const RowStatisticsParams params{.x = p.x,
                                     .mean = p.mean,
                                     .rstd = p.rstd,
                                     .rows = static_cast<std::uint32_t>(p.rows),
                                     .C = p.C,
                                     .threads_per_row = 0,
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
                                .C = p.C,
                                .threads_per_row = 0,
                                .groups = 0};
    if (p.norm_first) {
        launch_layernorm_bwd<Element, NormOrder::norm_then_gelu, kVector>("gelu_layernorm_bwd",
                                                                          args, stream);
    } else {
        launch_layernorm_bwd<Element, NormOrder::gelu_then_norm, kVector>("gelu_layernorm_bwd",
                                                                          args, stream);
    }
    const int groups = plan_rows(rows, p.C).groups;
    const auto sum = [&](float* out, const float* from) {
        if (out == nullptr) return;
        launch_sum_partials({from, out, 2 * static_cast<std::size_t>(p.C), groups, p.C}, stream);
    };
    sum(p.dln_weight, partials);
    sum(p.dln_bias, partials + p.C);
}

template <class Element>
void forward(const GeluLayerNormFwdParams& p, void* stream) {
    const bool vector = p.C % 8 == 0 && aligned(p.x) && aligned(p.y);
    vector ? forward<Element, true>(p, stream) : forward<Element, false>(p, stream);
}

template <class Element>
void backward(const GeluLayerNormBwdParams& p, void* stream) {
    const bool vector = p.C % 8 == 0 && aligned(p.dy) && aligned(p.x) && aligned(p.dx);
    vector ? backward<Element, true>(p, stream) : backward<Element, false>(p, stream);
}

}  // namespace

void launch_gelu_layernorm_fwd(const GeluLayerNormFwdParams& params, ElementType type,
                               void* stream) {
    check_rows(params.rows);
    switch (type) {
        case ElementType::bfloat16: return forward<BFloat16>(params, stream);
        case ElementType::float16: return forward<Float16>(params, stream);
        case ElementType::float32: return forward<Float32>(params, stream);
    }
}

std::size_t gelu_layernorm_bwd_workspace_bytes(std::int64_t rows, int C) {
    return sizeof(float) * 2 * C * plan_rows(static_cast<std::uint32_t>(rows), C).groups;
}

void launch_gelu_layernorm_bwd(const GeluLayerNormBwdParams& params, ElementType type,
                               void* stream) {
    check_rows(params.rows);
    if (params.C > kMostRowChannels) {
        throw std::invalid_argument("gelu_layernorm: C must be at most " +
                                    std::to_string(kMostRowChannels) + ", got " +
                                    std::to_string(params.C));
    }
    switch (type) {
        case ElementType::bfloat16: return backward<BFloat16>(params, stream);
        case ElementType::float16: return backward<Float16>(params, stream);
        case ElementType::float32: return backward<Float32>(params, stream);
    }
}

}  // namespace convnest::cuda
