// layernorm_residual on CUDA devices: the launches. Instances: forward 3 element types × vector or
// scalar access = 6; backward the same.
#include "common/row_launch.cuh"
#include "layernorm_residual_cuda.h"

namespace convnest::cuda {

namespace {

constexpr const char* kName = "layernorm_residual";

template <class Element, bool kVector>
void forward(const LayerNormResidualFwdParams& p, void* stream) {
    launch_row_statistics<Element, false, RowOutput::norm_residual, kVector>(
        "layernorm_residual_fwd",
        {.x = p.t,
         .mean = p.mean,
         .rstd = p.rstd,
         .rows = static_cast<std::uint32_t>(p.rows),
         .C = p.C,
         .eps = p.eps,
         .y = p.y,
         .ln_weight = p.ln_weight,
         .ln_bias = p.ln_bias,
         .residual = p.x,
         .scale = p.scale},
        stream);
}

template <class Element, bool kVector>
void backward(const LayerNormResidualBwdParams& p, void* stream) {
    const auto rows = static_cast<std::uint32_t>(p.rows);
    const bool sums = p.dln_weight != nullptr || p.dln_bias != nullptr || p.dscale != nullptr;
    float* partials = static_cast<float*>(p.workspace);
    launch_layernorm_bwd<Element, NormOrder::norm_residual, kVector>(
        "layernorm_residual_bwd",
        {.dy = p.dy,
         .x = p.t,
         .extra = p.dscale != nullptr ? p.x : nullptr,
         .mean = p.mean,
         .rstd = p.rstd,
         .ln_weight = p.ln_weight,
         .ln_bias = nullptr,
         .dx = p.dt,
         .partials = sums ? partials : nullptr,
         .rows = rows,
         .C = p.C,
         .scale = p.scale,
         .dresidual = p.dx},
        stream);
    const int blocks = row_blocks(rows);
    const auto sum = [&](float* out, const float* from) {
        if (out == nullptr) return;
        launch_sum_partials({from, out, 3 * static_cast<std::size_t>(p.C), blocks, p.C}, stream);
    };
    sum(p.dln_weight, partials);
    sum(p.dln_bias, partials + p.C);
    sum(p.dscale, partials + 2 * static_cast<std::size_t>(p.C));
}

}  // namespace

void launch_layernorm_residual_fwd(const LayerNormResidualFwdParams& params, ElementType type,
                                   void* stream) {
    check_rows(kName, params.rows, params.C);
    const bool vector = params.C % 8 == 0 && all_aligned(params.t, params.x, params.y);
    with_element(type, [&](auto element) {
        with_vector(vector, [&](auto is_vector) {
            forward<decltype(element), decltype(is_vector)::value>(params, stream);
        });
    });
}

std::size_t layernorm_residual_bwd_workspace_bytes(std::int64_t rows, int C) {
    return sizeof(float) * 3 * C * row_blocks(static_cast<std::uint32_t>(rows));
}

void launch_layernorm_residual_bwd(const LayerNormResidualBwdParams& params, ElementType type,
                                   void* stream) {
    check_rows(kName, params.rows, params.C);
    const bool vector =
        params.C % 8 == 0 && all_aligned(params.dy, params.t, params.x, params.dt, params.dx);
    with_element(type, [&](auto element) {
        with_vector(vector, [&](auto is_vector) {
            backward<decltype(element), decltype(is_vector)::value>(params, stream);
        });
    });
}

}  // namespace convnest::cuda
