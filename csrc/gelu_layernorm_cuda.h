// gelu_layernorm on CUDA devices: parameters and launches, without CUDA's headers.
//
//     y = LN(GELU(x)),  or with norm_first  y = GELU(LN(x))      over the last of [rows, C]
//
// Contiguous; x, y, dy and dx are of one type, the rest float. Launches go to the caller's
// stream on the current device, allocate nothing and wait for nothing. They throw
// std::invalid_argument for what they do not support, std::runtime_error for CUDA's errors.
#pragma once

#include "common/element_type.h"

#include <cstddef>
#include <cstdint>

namespace convnest::cuda {

struct GeluLayerNormFwdParams {
    const void* x;           // [rows, C]
    const float* ln_weight;  // [C] or null
    const float* ln_bias;    // [C] or null
    void* y;                 // [rows, C]
    float* mean;             // [rows] or null: not kept
    float* rstd;             // [rows] or null: not kept
    std::int64_t rows;
    int C;
    float eps;
    bool norm_first;
};

struct GeluLayerNormBwdParams {
    const void* dy;          // [rows, C]
    const void* x;           // [rows, C]
    const float* mean;       // [rows], as forward kept it
    const float* rstd;       // [rows], the same
    const float* ln_weight;  // [C] or null
    const float* ln_bias;    // [C] or null
    void* dx;                // [rows, C] or null
    float* dln_weight;       // [C] or null
    float* dln_bias;         // [C] or null
    void* workspace;         // gelu_layernorm_bwd_workspace_bytes(), 4-byte aligned
    std::int64_t rows;
    int C;
    bool norm_first;
};

void launch_gelu_layernorm_fwd(const GeluLayerNormFwdParams& params, ElementType type,
                               void* stream);

// C at most 8192.
std::size_t gelu_layernorm_bwd_workspace_bytes(std::int64_t rows, int C);
void launch_gelu_layernorm_bwd(const GeluLayerNormBwdParams& params, ElementType type,
                               void* stream);

}  // namespace convnest::cuda
