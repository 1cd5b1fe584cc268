// GELU in its exact erf form, and its derivative: one formula for host, device and SIMD vectors.
//
//   GELU(x)  = x Phi(x)                          Phi the normal distribution function
//   GELU'(x) = Phi(x) + x phi(x)                 phi its density
//
// For float32, with a = |x|:
//   Phi(-a)  = E t P(t),  phi(a) = E / sqrt(2 pi),  E = exp(-a^2 / 2),  t = 1 / (1 + p a)
//
// One exponential serves Phi and phi, and the negative side is E t P(t) itself, so that nothing
// cancels there; what a^2 loses in rounding is added back to the exponent. Measured on every
// instruction set, at every -O, over all floats of 2^-15 <= |x| < 14, with eps = 2^-23: the error
// of GELU(x) is below 6 eps |GELU(x)| for -10 <= x < 0 and below 1.5 eps max(1, |x|) everywhere;
// that of GELU'(x) below 6.2 eps (Phi(x) + |x| phi(x)) for x >= -10, and below 3.2 eps everywhere.
//
// For 16-bit activations, which round by 2^-9 or 2^-11, half of the work is enough:
//   Phi(-a)  = 2^p(a),  phi(a) = 2^p(a) h(a),  polynomials
// The error of GELU(x) is below 3e-5 |GELU(x)| for x >= -10, that of GELU'(x) below
// 1.5e-4 (Phi(x) + |x| phi(x)).
//
// All polynomials come from fit_gelu.py.
//
// Limits: GELU(+inf) = inf, GELU(-inf) = NaN (it is -inf times 0, as in PyTorch), GELU'(+-inf) =
// NaN, NaN gives NaN. Below x = -13.3, where Phi(x) < 2^-126, Phi(x) is exactly 0.
#pragma once

#include "inline.h"

namespace convnest {

constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kInvSqrt2Pi = 0.39894228040143267794;
constexpr float kHalfLog2e = 0.72134752f;      // E = 2^-(a^2 log2(e) / 2)
constexpr float kTwoLn2 = 1.38629436f;         // off by 3e-9 only, relative to 2 ln 2
constexpr float kTwoLn2High = 1.38623046875f;  // of 12 bits: exact when multiplied by n
constexpr float kTwoLn2Low = 6.389236989e-5f;
constexpr float kSlope = 0.305f;  // p of t
// |x| stops here, where `scaled` makes Phi exactly 0.
constexpr float kLargest = 13.4f;
// Added to a float of at most 2^22 it leaves its rounded value in the low bits.
constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23

template <class F>
struct NormalTail {
    F tail;     // Phi(-|x|)
    F density;  // E = exp(-x^2 / 2)
};

template <class F>
struct GeluAndGrad {
    F value;
    F grad;
};

// `Ops` names the type and the operations that a scalar, a vector and a device thread spell
// differently: Ops::F, magnitude(x, bound) = min(|x|, bound) and `bound` for NaN, reciprocal(x),
// square_rest(a, s) = a a - s exactly where s is the rounded a a, if_negative(x, a, b) = x < 0 ? a
// : b, and scaled(r, m) = r 2^n where n is the signed number in the low bits of m, 0 below the
// normal numbers, and multiply_add(a, b, c) = a b + c, which is rounded once where Ops::kFused says
// so. That must not be left to the compiler: it fuses a b + c from -O2 on only.
template <class Ops>
CONVNEST_INLINE NormalTail<typename Ops::F> normal_tail(typename Ops::F x) {
    using F = typename Ops::F;
    const F a = Ops::magnitude(x, kLargest);
    const F square = a * a;
    const F shifted = kRoundMagic - square * kHalfLog2e;
    // E = 2^n exp(-f / 2), |f| <= ln 2
    const F n = shifted - kRoundMagic;
    F f = Ops::multiply_add(n, Ops::kFused ? kTwoLn2 : kTwoLn2High, square);
    if (!Ops::kFused) f = f + n * kTwoLn2Low;
    f = f + Ops::square_rest(a, square);
    const F t = Ops::reciprocal(a * kSlope + 1.0f);
    F r = f * -2.594411860e-04f + 2.619874687e-03f;
    r = r * f - 2.083432471e-02f;
    r = r * f + 1.249971861e-01f;
    r = r * f - 4.999998870e-01f;
    r = r * f + 1.000000068e+00f;
    F p = t * 3.694327658e-02f - 1.540143546e-01f;
    p = p * t + 1.875006993e-01f;
    p = p * t - 3.963380216e-02f;
    p = p * t + 1.219067615e-01f;
    p = p * t + 1.031500031e-01f;
    p = p * t + 1.225106321e-01f;
    p = p * t + 1.216368507e-01f;
    const F density = Ops::scaled(r, shifted);
    return {density * (t * p), density};
}

template <class Ops>
CONVNEST_INLINE typename Ops::F gelu(typename Ops::F x) {
    const auto normal = normal_tail<Ops>(x);
    return x * Ops::if_negative(x, normal.tail, 1.0f - normal.tail);
}

template <class Ops>
CONVNEST_INLINE GeluAndGrad<typename Ops::F> gelu_and_grad(typename Ops::F x) {
    using F = typename Ops::F;
    const auto normal = normal_tail<Ops>(x);
    const F below = Ops::if_negative(x, normal.tail, 1.0f - normal.tail);
    return {x * below, below + x * (normal.density * static_cast<float>(kInvSqrt2Pi))};
}

// ---- for 16-bit activations ----

// Phi(-a)
template <class Ops>
CONVNEST_INLINE typename Ops::F short_tail(typename Ops::F a) {
    using F = typename Ops::F;
    F p = a * 6.002694780e-08f - 3.129660107e-06f;
    p = p * a + 7.173821281e-05f;
    p = p * a - 9.613111909e-04f;
    p = p * a + 8.501815338e-03f;
    p = p * a - 5.372678312e-02f;
    p = p * a - 4.589116228e-01f;
    p = p * a - 1.150985872e+00f;
    p = p * a - 1.000023959e+00f;
    const F shifted = p + kRoundMagic;
    const F f = p - (shifted - kRoundMagic);
    F r = f * 9.568684544e-03f + 5.591755526e-02f;
    r = r * f + 2.402478347e-01f;
    r = r * f + 6.931219261e-01f;
    r = r * f + 9.999992593e-01f;
    return Ops::scaled(r, shifted);
}

template <class Ops>
CONVNEST_INLINE typename Ops::F short_gelu(typename Ops::F x) {
    const auto tail = short_tail<Ops>(Ops::magnitude(x, kLargest));
    return x * Ops::if_negative(x, tail, 1.0f - tail);
}

// The value is that of short_gelu, bit by bit.
template <class Ops>
CONVNEST_INLINE GeluAndGrad<typename Ops::F> short_gelu_and_grad(typename Ops::F x) {
    using F = typename Ops::F;
    const F a = Ops::magnitude(x, kLargest);
    const F tail = short_tail<Ops>(a);
    F h = a * 4.557724218e-06f - 1.677716625e-04f;
    h = h * a + 2.558801846e-03f;
    h = h * a - 2.132340897e-02f;
    h = h * a + 1.088241483e-01f;
    h = h * a + 6.373726313e-01f;
    h = h * a + 7.978040157e-01f;
    const F below = Ops::if_negative(x, tail, 1.0f - tail);
    return {x * below, below + x * (tail * h)};
}

}  // namespace convnest
