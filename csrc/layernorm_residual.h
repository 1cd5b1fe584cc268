// layernorm_residual on the CPU: y = scale * x + LN(t).
//
// All tensors are contiguous. Activations are [rows, C] of `dtype`; parameters, statistics and
// parameter gradients are of the accumulate type (float; double for double).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace convnest {

struct LayernormResidualFwdParams {
    const void* t;          // [rows, C]
    const void* x;          // [rows, C]
    const void* ln_weight;  // [C], null: ones
    const void* ln_bias;    // [C], null: zeros
    const void* scale;      // [C], null: ones
    void* y;                // [rows, C]
    void* mean;             // [rows] of t, null: not kept
    void* rstd;             // [rows] of t, null: not kept
    std::int64_t rows, C;
    double eps;
    DType dtype;
};

// dt = LN^T(dy);  dx = scale * dy;  dscale = sum over rows of dy * x
struct LayernormResidualBwdParams {
    const void* dy;         // [rows, C]
    const void* t;          // [rows, C]
    const void* x;          // [rows, C], read for dscale only
    const void* mean;       // [rows]
    const void* rstd;       // [rows]
    const void* ln_weight;  // [C], null: ones
    const void* scale;      // [C], null: ones
    void* dt;               // [rows, C], null: not needed
    void* dx;               // [rows, C], null: not needed
    void* dln_weight;       // [C], null: not needed
    void* dln_bias;         // [C], null: not needed
    void* dscale;           // [C], null: not needed
    std::int64_t rows, C;
    DType dtype;
};

}  // namespace convnest
