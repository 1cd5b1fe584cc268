// layernorm_residual on CUDA devices: parameters and launches, without CUDA's headers.
//
//     y = s ⊙ x + LN(t)      over the last of [rows, C]
//
// Contiguous; t, x, y and their gradients are of one type, the rest float. Launches go to the
// caller's stream on the current device, allocate nothing and wait for nothing. They throw
// std::invalid_argument for what they do not support, std::runtime_error for CUDA's errors.
#pragma once

#include "common/element_type.h"

#include <cstddef>
#include <cstdint>

namespace convnest::cuda {

struct LayerNormResidualFwdParams {
    const void* t;           // [rows, C]
    const void* x;           // [rows, C]
    const float* ln_weight;  // [C] or null
    const float* ln_bias;    // [C] or null
    const float* scale;      // [C] or null: 1
    void* y;                 // [rows, C]
    float* mean;             // [rows] or null: not kept
    float* rstd;             // [rows] or null: not kept
    std::int64_t rows;
    int C;
    float eps;
};

struct LayerNormResidualBwdParams {
    const void* dy;          // [rows, C]
    const void* t;           // [rows, C]
    const void* x;           // [rows, C]; read for dscale alone
    const float* mean;       // [rows], as forward kept it
    const float* rstd;       // [rows], the same
    const float* ln_weight;  // [C] or null
    const float* scale;      // [C] or null
    void* dt;                // [rows, C] or null
    void* dx;                // [rows, C] or null
    float* dln_weight;       // [C] or null
    float* dln_bias;         // [C] or null
    float* dscale;           // [C] or null
    void* workspace;         // layernorm_residual_bwd_workspace_bytes(), 4-byte aligned
    std::int64_t rows;
    int C;
};

void launch_layernorm_residual_fwd(const LayerNormResidualFwdParams& params, ElementType type,
                                   void* stream);

// C at most 8192.
std::size_t layernorm_residual_bwd_workspace_bytes(std::int64_t rows, int C);
void launch_layernorm_residual_bwd(const LayerNormResidualBwdParams& params, ElementType type,
                                   void* stream);

}  // namespace convnest::cuda
