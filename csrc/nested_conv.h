// nested_conv on the CPU: v = GELU(u), u = [g +] DW(z) + conv_bias, z = LN(g), g = GELU(h).
//
// All tensors are contiguous. Activations are [N, H, W, C] of `dtype`; parameters, statistics and
// parameter gradients are of the accumulate type (float; double for double). Zero padding is of z.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace convnest {

struct NestedConvFwdParams {
    const void* h;            // [N, H, W, C]
    const void* conv_weight;  // [C, K * K]
    const void* conv_bias;    // [C], null: none
    const void* ln_weight;    // [C], null: ones
    const void* ln_bias;      // [C], null: zeros
    void* v;                  // [N, H, W, C]
    void* u;                  // [N, H, W, C], null: not kept
    void* mean;               // [N, H, W] of g, null: not kept
    void* rstd;               // [N, H, W] of g, null: not kept
    std::int64_t N, H, W, C;
    int K;
    double eps;
    bool shortcut;
    DType dtype;
};

// du = dv GELU'(u);  dz = DW^T(du);  dg = LN^T(dz) [+ du];  dh = dg GELU'(h)
struct NestedConvBwdParams {
    const void* dv;           // [N, H, W, C]
    const void* h;            // [N, H, W, C]
    const void* u;            // [N, H, W, C]
    const void* mean;         // [N, H, W]
    const void* rstd;         // [N, H, W]
    const void* conv_weight;  // [C, K * K]
    const void* ln_weight;    // [C], null: ones
    const void* ln_bias;      // [C], null: zeros
    void* dh;                 // [N, H, W, C], null: not needed
    void* dconv_weight;       // [C, K * K], null: not needed
    void* dconv_bias;         // [C], null: not needed
    void* dln_weight;         // [C], null: not needed
    void* dln_bias;           // [C], null: not needed
    std::int64_t N, H, W, C;
    int K;
    bool shortcut;
    DType dtype;
};

}  // namespace convnest
