// dwconv_gelu_layernorm on CUDA devices: parameters and launches, without CUDA's headers.
//
//     c = DW(x) + conv_bias;  y = LN(act(c)), or act(LN(c)) with norm_first;  act: GELU or nothing
//
// Everything is NHWC and contiguous; x, y, c, dy and dx are of one type, the rest float. Launches
// go to the caller's stream on the current device, allocate nothing and wait for nothing. They
// throw std::invalid_argument for what they do not support, std::runtime_error for CUDA's errors.
#pragma once

#include "common/element_type.h"

#include <cstddef>

namespace convnest::cuda {

struct DwconvGeluLayerNormFwdParams {
    const void* x;             // [N, H, W, C]
    const float* conv_weight;  // [C, K·K]
    const float* conv_bias;    // [C] or null
    const float* ln_weight;    // [C] or null
    const float* ln_bias;      // [C] or null
    void* y;                   // [N, H, W, C]
    void* c;                   // [N, H, W, C], never null: the norm reads it
    float* mean;               // [N, H, W] of the norm's input, or null: not kept
    float* rstd;               // [N, H, W], the same
    int N, H, W, C;
    float eps;
    bool gelu, norm_first;
};

struct DwconvGeluLayerNormBwdParams {
    const void* dy;            // [N, H, W, C]
    const void* x;             // [N, H, W, C]
    const void* c;             // [N, H, W, C], as forward left it
    const float* mean;         // [N, H, W], as forward kept it
    const float* rstd;         // [N, H, W], the same
    const float* conv_weight;  // [C, K·K]
    const float* ln_weight;    // [C] or null
    const float* ln_bias;      // [C] or null
    void* dx;                  // [N, H, W, C] or null
    float* dconv_weight;       // [C, K·K] or null
    float* dconv_bias;         // [C] or null
    float* dln_weight;         // [C] or null
    float* dln_bias;           // [C] or null
    void* workspace;           // dwconv_gelu_layernorm_bwd_workspace_bytes(), 16-byte aligned
    int N, H, W, C;
    bool gelu, norm_first;
};

// 3, 5, 7, 9, 11, 13, in every type.
bool dwconv_gelu_layernorm_has_kernel_size(int kernel_size, ElementType type);

// Throws std::invalid_argument for what the kernels do not support.
void check_dwconv_gelu_layernorm(int N, int H, int W, int C, int kernel_size, ElementType type);

void launch_dwconv_gelu_layernorm_fwd(const DwconvGeluLayerNormFwdParams& params, int kernel_size,
                                      ElementType type, void* stream);

std::size_t dwconv_gelu_layernorm_bwd_workspace_bytes(int N, int H, int W, int C, int kernel_size,
                                                      ElementType type);
void launch_dwconv_gelu_layernorm_bwd(const DwconvGeluLayerNormBwdParams& params, int kernel_size,
                                      ElementType type, void* stream);

}  // namespace convnest::cuda
