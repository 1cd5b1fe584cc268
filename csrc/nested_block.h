// nested_block on the CPU: the whole block, x → y, its wide features in cache only.
//
//   h = x W1^T + b1;  g = GELU(h);  z = LN(g);  u = [g +] DW(z) + conv_bias;  v = GELU(u)
//   t = v W2^T + b2;  y = scale x + LN(t)
//
// C narrow channels, D wide ones. All tensors are contiguous. Activations are of `dtype`;
// parameters, statistics and parameter gradients are of the accumulate type (float; double for
// double). For 16-bit activations h, v and t are rounded to them, as separate layers would.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace convnest {

struct NestedBlockFwdParams {
    const void* x;            // [N, H, W, C]
    const void* fc1_weight;   // [D, C]; the three weights are not read where they are packed
    const void* fc1_bias;     // [D], null: none
    const void* norm_weight;  // [D], null: ones
    const void* norm_bias;    // [D], null: zeros
    const void* conv_weight;  // [D, K * K]
    const void* conv_bias;    // [D], null: none
    const void* fc2_weight;   // [C, D]
    const void* fc2_bias;     // [C], null: none
    const void* post_weight;  // [C], null: ones
    const void* post_bias;    // [C], null: zeros
    const void* scale;        // [C], null: ones
    const void* packed;       // the three weights as nested_block_pack leaves them; null: not yet
    void* y;                  // [N, H, W, C], null: not needed
    void* h;                  // [N, H, W, D], null: not kept
    void* u;                  // [N, H, W, D], null: not kept
    void* mean;               // [N, H, W] of g, null: not kept
    void* rstd;               // [N, H, W] of g, null: not kept
    void* t;                  // [N, H, W, C], null: not kept
    void* post_mean;          // [N, H, W] of t, null: not kept
    void* post_rstd;          // [N, H, W] of t, null: not kept
    std::int64_t N, H, W, C, D;
    int K;
    double eps;
    bool shortcut;
    DType dtype;
};

// dt = LN^T(dy);  dv = dt W2;  du, dz, dg, dh as in nested_conv;  dx = scale dy + dh W1
struct NestedBlockBwdParams {
    const void* dy;           // [N, H, W, C]
    const void* x;            // [N, H, W, C]
    const void* h;            // [N, H, W, D], null: computed again from x
    const void* u;            // [N, H, W, D], null: computed again from h
    const void* mean;         // [N, H, W] of g
    const void* rstd;         // [N, H, W] of g
    const void* t;            // [N, H, W, C]
    const void* post_mean;    // [N, H, W] of t
    const void* post_rstd;    // [N, H, W] of t
    const void* fc1_weight;   // [D, C]
    const void* fc1_bias;     // [D], null: none
    const void* norm_weight;  // [D], null: ones
    const void* norm_bias;    // [D], null: zeros
    const void* conv_weight;  // [D, K * K]
    const void* conv_bias;    // [D], null: none
    const void* fc2_weight;   // [C, D]
    const void* post_weight;  // [C], null: ones
    const void* scale;        // [C], null: ones
    void* dx;                 // [N, H, W, C]; null: not needed, as all below
    void* dfc1_weight;        // [D, C]
    void* dfc1_bias;          // [D]
    void* dnorm_weight;       // [D]
    void* dnorm_bias;         // [D]
    void* dconv_weight;       // [D, K * K]
    void* dconv_bias;         // [D]
    void* dfc2_weight;        // [C, D]
    void* dfc2_bias;          // [C]
    void* dpost_weight;       // [C]
    void* dpost_bias;         // [C]
    void* dscale;             // [C]
    std::int64_t N, H, W, C, D;
    int K;
    double eps;
    bool shortcut;
    DType dtype;
};

}  // namespace convnest
