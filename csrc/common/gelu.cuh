// GELU(x) = x Φ(x) and its derivative Φ(x) + x φ(x), for 16-bit activations: with one special
// function for the first, two for the second, and no branch. The upper tail is Q(t) = 1 − Φ(t).
//
//     GELU(x)  = max(x, 0) − t Q(t),   t = |x|,   Q(t) = 2^q(t)
//     GELU'(x) = x < 0 ? S(t) : 1 − S(t),   S(t) = Q(t) − t φ(t) = φ(t) (Q/φ − t)
//
// q is a polynomial that fits log2 Q on [0, 6]; beyond, where Q < 1e-9, it keeps falling and 2^q
// underflows to 0. Q/φ = s m(s) with s = 1 / (1 + k t). The degrees (common/fit_gelu.py) follow
// from the type's rounding: the relative error of Q and that of S's second factor are
//                    rounds by   Q         S
//     bf16           3.9e-3      3.7e-4    2.5e-4
//     fp16           4.9e-4      7e-6      4.1e-5   (in float)
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

CONVNEST_INLINE float reciprocal_fast(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.f / x;
#endif
}

// Coefficients: that of the highest power first.
template <class... Rest>
__device__ __forceinline__ float polynomial(float x, float p, Rest... rest) {
    ((p = fmaf(p, x, rest)), ...);
    return p;
}

template <class Element>
struct GeluFit;

template <>
struct GeluFit<BFloat16> {
    __device__ __forceinline__ static float log2_tail(float t) {
        return polynomial(t, -2.016842542e-04f, 4.467603315e-03f, -4.283271579e-02f,
                          -4.727857317e-01f, -1.144399652e+00f, -1.000531820e+00f);
    }
    static constexpr float k = 0.35f;
    __device__ __forceinline__ static float m(float s) {
        return polynomial(s, 7.519708575e-01f, 1.120498347e-01f, 3.896032417e-01f);
    }
};

template <>
struct GeluFit<Float16> {
    __device__ __forceinline__ static float log2_tail(float t) {
        return polynomial(t, -1.835873432e-06f, 6.161977670e-05f, -9.306938850e-04f,
                          8.508539128e-03f, -5.396129923e-02f, -4.584633934e-01f, -1.151251205e+00f,
                          -9.999953431e-01f);
    }
    static constexpr float k = 0.45f;
    __device__ __forceinline__ static float m(float s) {
        return polynomial(s, -2.971449882e-01f, 7.753762379e-01f, 3.082437448e-01f,
                          4.668544699e-01f);
    }
};

template <class Element>
__device__ __forceinline__ float gelu_fast(float x) {
    const float t = fabsf(x);
    const float tail = exp2_fast(GeluFit<Element>::log2_tail(t));
    return fmaf(-t, tail, fmaxf(x, 0.f));
}

template <class Element>
__device__ __forceinline__ float gelu_slope_fast(float x) {
    using Fit = GeluFit<Element>;
    constexpr float kMinusHalfLog2E = -0.72134752f;
    constexpr float kLog2InvSqrt2Pi = -1.32574807f;
    const float t = fabsf(x);
    const float density = exp2_fast(fmaf(x * kMinusHalfLog2E, x, kLog2InvSqrt2Pi));
    const float s = reciprocal_fast(fmaf(t, Fit::k, 1.f));
    const float slope = density * fmaf(s, Fit::m(s), -t);
    return x < 0.f ? slope : 1.f - slope;
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
    CONVNEST_INLINE F reciprocal(F x) { return reciprocal_fast(x); }
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
        return gelu_fast<Element>(x);
    }
}

template <class Element>
__device__ __forceinline__ float gelu_slope_of(float x) {
    if constexpr (std::is_same_v<Element, Float32>) {
        return gelu_and_grad<ScalarOps>(x).grad;
    } else {
        return gelu_slope_fast<Element>(x);
    }
}

}  // namespace convnest::cuda
