// GELU in its exact erf form, and its derivative: one formula for host, device and SIMD vectors.
//
//   GELU(x)  = x Phi(x)                          Phi the normal distribution function
//   GELU'(x) = Phi(x) + x phi(x)                 phi its density
//   Phi(-a)  = E t P(t),  phi(a) = E / sqrt(2 pi),  E = exp(-a^2 / 2),  t = 1 / (1 + p a),  a >= 0
//
// One exponential serves Phi and phi, and the negative side is E t P(t) itself, so that nothing
// cancels there. P and the polynomial of the exponential come from fit_gelu.py. In float32
// |error of GELU(x)| <= 1.5e-7 max(1, |x|), relative to GELU(x) it is below 6e-6 for -5 <= x < 0,
// and |error of GELU'(x)| <= 3e-7 (all measured, on every instruction set).
//
// Limits: GELU(+inf) = inf, GELU(-inf) = NaN (it is -inf times 0, as in PyTorch), GELU'(+-inf) =
// NaN, NaN gives NaN. Below x = -13.3, where Phi(x) < 2^-126, Phi(x) is exactly 0.
#pragma once

#include "inline.h"

namespace convnest {

constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kInvSqrt2Pi = 0.39894228040143267794;
// E = 2^-(s^2) with s = a sqrt(log2(e) / 2)
constexpr float kSqrtHalfLog2e = 0.849321800288019f;
// s stops here, where round(s^2) = 127 makes E exactly 0.
constexpr float kLargestScaled = 11.2694f;
// p / sqrt(log2(e) / 2) with p = 0.346
constexpr float kSlope = 0.407383868f;
// Added to a float it leaves round(x) + 127 in the low bits: a float exponent once shifted up.
constexpr float kExponentMagic = 12583039.0f;  // 1.5 * 2^23 + 127

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
// differently: Ops::F, magnitude(x) = |x|, minimum(x, bound), reciprocal(x), if_negative(x, a, b)
// = x < 0 ? a : b, and exponent(m) = the float whose exponent field is the low byte of m's bits.
template <class Ops>
CONVNEST_INLINE NormalTail<typename Ops::F> normal_tail(typename Ops::F x) {
    using F = typename Ops::F;
    const F s = Ops::minimum(Ops::magnitude(x) * kSqrtHalfLog2e, kLargestScaled);
    const F q = s * s;
    const F shifted = kExponentMagic - q;
    const F f = (kExponentMagic - shifted) - q;  // 2^-q = 2^-round(q) 2^f, |f| <= 1/2
    const F t = Ops::reciprocal(s * kSlope + 1.0f);
    F r = f * 1.325433798e-03f + 9.672335379e-03f;
    r = r * f + 5.550795936e-02f;
    r = r * f + 2.402222432e-01f;
    r = r * f + 6.931468917e-01f;
    r = r * f + 1.0f;
    F p = t * 4.495813795e-02f - 1.916645570e-01f;
    p = p * t + 2.327187229e-01f;
    p = p * t - 6.593779989e-03f;
    p = p * t + 1.481801714e-01f;
    p = p * t + 1.341383380e-01f;
    p = p * t + 1.382629967e-01f;
    const F density = Ops::exponent(shifted) * r;
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

}  // namespace convnest
