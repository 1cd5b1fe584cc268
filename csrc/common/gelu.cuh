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

#include <cmath>

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

__device__ __forceinline__ float reciprocal_fast(float x) {
#if defined(__CUDACC__)
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.f / x;
#endif
}

// r 2^n, where n is the signed number in the low bits of m; 0 below the normal numbers.
__device__ __forceinline__ float scaled(float r, float m) {
    const auto bits = static_cast<std::int32_t>(float_to_bits(r) + (float_to_bits(m) << 23));
    return bits_to_float(bits > 0 ? bits : 0);
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

struct NormalTail {
    float tail;     // Φ(−|x|)
    float density;  // exp(−x² / 2)
};

// For float32: Φ(−a) = E t P(t), E = exp(−a² / 2), t = 1 / (1 + k a), a = |x|. What a² loses in
// rounding is added back to the exponent. The relative error is below 8e-7 for a <= 10, and beyond
// 13.3 the tail is 0.
__device__ __forceinline__ NormalTail normal_tail(float x) {
    constexpr float kLargest = 13.4f, kSlope = 0.305f, kHalfLog2e = 0.72134752f;
    constexpr float kTwoLn2 = 1.38629436f;
    constexpr float kRoundMagic = 12582912.f;  // 1.5 · 2^23: leaves a rounded value in the low bits
    const float a = fabsf(x) < kLargest ? fabsf(x) : kLargest;
    const float square = a * a;
    // E = 2^n exp(−f / 2), |f| <= ln 2
    const float shifted = fmaf(-square, kHalfLog2e, kRoundMagic);
    const float f = fmaf(shifted - kRoundMagic, kTwoLn2, square) + fmaf(a, a, -square);
    const float r = polynomial(f, -2.594411860e-04f, 2.619874687e-03f, -2.083432471e-02f,
                               1.249971861e-01f, -4.999998870e-01f, 1.000000068e+00f);
    const float density = scaled(r, shifted);
    const float t = reciprocal_fast(fmaf(a, kSlope, 1.f));
    const float p =
        polynomial(t, 3.694327658e-02f, -1.540143546e-01f, 1.875006993e-01f, -3.963380216e-02f,
                   1.219067615e-01f, 1.031500031e-01f, 1.225106321e-01f, 1.216368507e-01f);
    return {density * (t * p), density};
}

__device__ __forceinline__ float gelu_float(float x) {
    const float tail = normal_tail(x).tail;
    return x * (x < 0.f ? tail : 1.f - tail);
}

__device__ __forceinline__ float gelu_slope_float(float x) {
    constexpr float kInvSqrt2Pi = 0.39894228f;
    const NormalTail normal = normal_tail(x);
    const float below = x < 0.f ? normal.tail : 1.f - normal.tail;
    return fmaf(x, normal.density * kInvSqrt2Pi, below);
}

struct GeluAndSlope {
    float value, slope;
};

// Both, from one tail: the slope is Φ(x) + x φ(x), off by the tail's error, 1.9e-4 at most in bf16.
template <class Element>
__device__ __forceinline__ GeluAndSlope gelu_and_slope(float x) {
    if constexpr (std::is_same_v<Element, Float32>) {
        constexpr float kInvSqrt2Pi = 0.39894228f;
        const NormalTail normal = normal_tail(x);
        const float below = x < 0.f ? normal.tail : 1.f - normal.tail;
        return {x * below, fmaf(x, normal.density * kInvSqrt2Pi, below)};
    } else {
        constexpr float kMinusHalfLog2E = -0.72134752f;
        constexpr float kLog2InvSqrt2Pi = -1.32574807f;
        const float t = fabsf(x);
        const float tail = exp2_fast(GeluFit<Element>::log2_tail(t));
        const float density = exp2_fast(fmaf(x * kMinusHalfLog2E, x, kLog2InvSqrt2Pi));
        return {fmaf(-t, tail, fmaxf(x, 0.f)), fmaf(x, density, x < 0.f ? tail : 1.f - tail)};
    }
}

// GELU and its derivative, as exact as activations of this type can tell.
template <class Element>
__device__ __forceinline__ float gelu_of(float x) {
    if constexpr (std::is_same_v<Element, Float32>) {
        return gelu_float(x);
    } else {
        return gelu_fast<Element>(x);
    }
}

template <class Element>
__device__ __forceinline__ float gelu_slope_of(float x) {
    if constexpr (std::is_same_v<Element, Float32>) {
        return gelu_slope_float(x);
    } else {
        return gelu_slope_fast<Element>(x);
    }
}

}  // namespace convnest::cuda
