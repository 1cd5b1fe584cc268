// GELU(x) = x Φ(x) and its derivative Φ(x) + x φ(x), for 16-bit activations, with one (two)
// special-function calls and no branch.
//
// The upper tail Q(t) = 1 − Φ(t) = 2^p(t), t = |x|, with p the polynomial of degree 7 that fits
// log2 Q on [0, 6] with a relative error of Q below 7e-6 in float (fp16 rounds by 4.9e-4, bf16 by
// 3.9e-3). Beyond 6, where Q < 1e-9, p keeps falling and 2^p underflows to 0.
//     GELU(x)  = max(x, 0) − |x| Q(|x|)
//     GELU'(x) = Φ(x) + x φ(x),   Φ(x) = x < 0 ? Q : 1 − Q,   φ(x) = 2^(−x²/(2 ln 2)) / √(2π)
// NaN stays NaN. GELU(+∞) is NaN (eager: +∞), GELU(−∞) is NaN as in eager.
#pragma once

#include <type_traits>

#include "common/element.cuh"
#include "common/math.h"

#include <cmath>
#include <cstring>

namespace convnest::cuda {

__device__ __forceinline__ float exp2_fast(float x) {
#if defined(__CUDACC__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return std::exp2(x);
#endif
}

__device__ __forceinline__ float normal_tail(float t) {
    float p = -1.8348179e-06f;
    p = fmaf(p, t, 6.1598425e-05f);
    p = fmaf(p, t, -9.3052589e-04f);
    p = fmaf(p, t, 8.5078953e-03f);
    p = fmaf(p, t, -5.3960077e-02f);
    p = fmaf(p, t, -4.5846438e-01f);
    p = fmaf(p, t, -1.1512511e+00f);
    p = fmaf(p, t, -9.9999529e-01f);
    return exp2_fast(p);
}

__device__ __forceinline__ float gelu_fast(float x) {
    const float t = fabsf(x);
    return fmaf(-t, normal_tail(t), fmaxf(x, 0.f));
}

__device__ __forceinline__ float gelu_slope_fast(float x) {
    constexpr float kMinusHalfLog2E = -0.72134752f;
    constexpr float kLog2InvSqrt2Pi = -1.32574807f;
    const float tail = normal_tail(fabsf(x));
    const float density = exp2_fast(fmaf(x * kMinusHalfLog2E, x, kLog2InvSqrt2Pi));
    return fmaf(x, density, x < 0.f ? tail : 1.f - tail);
}

// The exact form of common/math.h in float, for float32 activations.
struct ScalarOps {
    using F = float;
#if defined(__CUDA_ARCH__)
    static constexpr bool kFused = true;
#else
    static constexpr bool kFused = false;
#endif
    CONVNEST_INLINE F magnitude(F x, float bound) {
        const float a = fabsf(x);
        return a < bound ? a : bound;
    }
    CONVNEST_INLINE F multiply_add(F a, F b, F c) {
#if defined(__CUDA_ARCH__)
        return fmaf(a, b, c);
#else
        return a * b + c;
#endif
    }
    CONVNEST_INLINE F square_rest(F a, F square) { return fmaf(a, a, -square); }
    CONVNEST_INLINE F reciprocal(F x) {
#if defined(__CUDA_ARCH__)
        float y;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
        return y;
#else
        return 1.f / x;
#endif
    }
    CONVNEST_INLINE F if_negative(F x, F a, F b) { return x < 0.f ? a : b; }
    CONVNEST_INLINE F scaled(F r, F m) {
#if defined(__CUDA_ARCH__)
        return __int_as_float(max(__float_as_int(r) + (__float_as_int(m) << 23), 0));
#else
        std::uint32_t bits, shift;
        std::memcpy(&bits, &r, sizeof bits);
        std::memcpy(&shift, &m, sizeof shift);
        bits += shift << 23;
        if (bits >> 31) bits = 0;
        std::memcpy(&r, &bits, sizeof bits);
        return r;
#endif
    }
};

// GELU and its derivative, as exact as activations of this type can tell.
template <class Element>
__device__ __forceinline__ float gelu_of(float x) {
    if constexpr (std::is_same_v<Element, Float32>) {
        return gelu<ScalarOps>(x);
    } else {
        return gelu_fast(x);
    }
}

template <class Element>
__device__ __forceinline__ float gelu_slope_of(float x) {
    if constexpr (std::is_same_v<Element, Float32>) {
        return gelu_and_grad<ScalarOps>(x).grad;
    } else {
        return gelu_slope_fast(x);
    }
}

}  // namespace convnest::cuda
