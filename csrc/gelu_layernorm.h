// gelu_layernorm on the CPU: y = LN(GELU(x)), or GELU(LN(x)) when norm_first is set.
//
// All tensors are contiguous. Activations are [rows, C] of `dtype`; parameters, statistics and
// parameter gradients are of the accumulate type (float; double for double).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace convnest {

struct GeluLayernormFwdParams {
    const void* x;          // [rows, C]
    const void* ln_weight;  // [C], null: ones
    const void* ln_bias;    // [C], null: zeros
    void* y;                // [rows, C]
    void* mean;             // [rows] of the norm's input, null: not kept
    void* rstd;             // [rows] of the norm's input, null: not kept
    std::int64_t rows, C;
    double eps;
    bool norm_first;
    DType dtype;
};

// dx = GELU'(x) LN^T(dy), or LN^T(GELU'(LN(x)) dy) when norm_first is set
struct GeluLayernormBwdParams {
    const void* dy;         // [rows, C]
    const void* x;          // [rows, C]
    const void* mean;       // [rows]
    const void* rstd;       // [rows]
    const void* ln_weight;  // [C], null: ones
    const void* ln_bias;    // [C], null: zeros
    void* dx;               // [rows, C], null: not needed
    void* dln_weight;       // [C], null: not needed
    void* dln_bias;         // [C], null: not needed
    std::int64_t rows, C;
    bool norm_first;
    DType dtype;
};

}  // namespace convnest
