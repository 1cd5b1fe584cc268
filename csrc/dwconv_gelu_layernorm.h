// dwconv_gelu_layernorm on the CPU: y = LN(act(c)), or act(LN(c)) when norm_first is set,
// c = DW(x) + conv_bias, act = GELU or nothing.
//
// All tensors are contiguous. Activations are [N, H, W, C] of `dtype`; parameters, statistics and
// parameter gradients are of the accumulate type (float; double for double).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace convnest {

struct DwconvGeluLayernormFwdParams {
    const void* x;            // [N, H, W, C]
    const void* conv_weight;  // [C, K * K]
    const void* conv_bias;    // [C], null: none
    const void* ln_weight;    // [C], null: ones
    const void* ln_bias;      // [C], null: zeros
    void* y;                  // [N, H, W, C]
    void* c;                  // [N, H, W, C], null: not kept
    void* mean;               // [N, H, W] of the norm's input, null: not kept
    void* rstd;               // [N, H, W] of the norm's input, null: not kept
    std::int64_t N, H, W, C;
    int K;
    double eps;
    bool gelu, norm_first;
    DType dtype;
};

// dc = act'(c) LN^T(dy), or LN^T(act'(LN(c)) dy) when norm_first is set;  dx = DW^T(dc)
struct DwconvGeluLayernormBwdParams {
    const void* dy;           // [N, H, W, C]
    const void* x;            // [N, H, W, C]
    const void* c;            // [N, H, W, C]
    const void* mean;         // [N, H, W]
    const void* rstd;         // [N, H, W]
    const void* conv_weight;  // [C, K * K]
    const void* ln_weight;    // [C], null: ones
    const void* ln_bias;      // [C], null: zeros
    void* dx;                 // [N, H, W, C], null: not needed
    void* dconv_weight;       // [C, K * K], null: not needed
    void* dconv_bias;         // [C], null: not needed
    void* dln_weight;         // [C], null: not needed
    void* dln_bias;           // [C], null: not needed
    std::int64_t N, H, W, C;
    int K;
    bool gelu, norm_first;
    DType dtype;
};

}  // namespace convnest
