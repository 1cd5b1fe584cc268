// nested_conv on CUDA devices: parameters and launches, without CUDA's headers.
//
//     g = GELU(h);  z = LN(g);  u = [g +] DW(z) + conv_bias;  v = GELU(u)
//
// Everything is NHWC and contiguous; activations are of one type, the rest float. Launches
// go to the caller's stream on the current device, allocate nothing and wait for nothing. They
// throw std::invalid_argument for what they do not support, std::runtime_error for CUDA's errors.
#pragma once

#include "common/element_type.h"

#include <cstddef>

namespace convnest::cuda {

struct NestedConvFwdParams {
    const void* h;             // [N, H, W, C]
    const float* conv_weight;  // [C, K·K]
    const float* conv_bias;    // [C] or null
    const float* ln_weight;    // [C] or null
    const float* ln_bias;      // [C] or null
    void* v;                   // [N, H, W, C]
    void* u;                   // [N, H, W, C], or null: not kept
    float* mean;               // [N, H, W], written here and read by the convolution; never null
    float* rstd;               // [N, H, W], the same
    int N, H, W, C;
    float eps;
    bool shortcut;
};

struct NestedConvBwdParams {
    const void* dv;            // [N, H, W, C]
    const void* h;             // [N, H, W, C]
    const void* u;             // [N, H, W, C], as forward kept it
    const float* mean;         // [N, H, W], as forward kept it
    const float* rstd;         // [N, H, W], the same
    const float* conv_weight;  // [C, K·K]
    const float* ln_weight;    // [C] or null
    const float* ln_bias;      // [C] or null
    void* dh;                  // [N, H, W, C] or null
    float* dconv_weight;       // [C, K·K] or null
    float* dconv_bias;         // [C] or null
    float* dln_weight;         // [C] or null
    float* dln_bias;           // [C] or null
    void* workspace;           // nested_conv_bwd_workspace_bytes(), 16-byte aligned
    int N, H, W, C;
    bool shortcut;
};

// 3, 5, 7, 9, 11, 13, in every type.
bool nested_conv_has_kernel_size(int kernel_size, ElementType type);

// Throws std::invalid_argument for what the kernels do not support.
void check_nested_conv(int N, int H, int W, int C, int kernel_size, ElementType type);

void launch_nested_conv_fwd(const NestedConvFwdParams& params, int kernel_size, ElementType type,
                            void* stream);

// Of this call on the current device; `workspace` itself is not read, nor is any tensor.
std::size_t nested_conv_bwd_workspace_bytes(const NestedConvBwdParams& params, int kernel_size,
                                            ElementType type);
void launch_nested_conv_bwd(const NestedConvBwdParams& params, int kernel_size, ElementType type,
                            void* stream);

}  // namespace convnest::cuda
