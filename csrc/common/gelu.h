// GELU in its exact erf form, and its derivative, of vectors.
//
//   GELU(x)  = x Phi(x)                          Phi the normal distribution function
//   GELU'(x) = Phi(x) + x phi(x)                 phi its density
//
// For float32, with a = |x| and E = exp(-a^2 / 2):
//   phi(a)  = E / sqrt(2 pi),  E = 2^n (1 + q)   q a polynomial in what is left of the exponent
//   Phi(-a) = E R(a) = 2^n (R + R q)             R a polynomial around one of 16 (8) centres
//
// R falls slowly, from 1/2 to 0.03, so a few coefficients do between two centres; a register holds
// one coefficient of all centres, and a permutation looks it up. At a centre R is a float but for
// 1e-9 of it, so the constants add no error; what a^2 loses in rounding is added back to the
// exponent; and on the negative side the tail is E R itself, where nothing cancels. What is left is
// little more than the rounding of R, of the tail and of the product with x. Measured on every
// instruction set, at every -O, over all floats of 2^-15 <= |x| < 14, with eps = 2^-23: the error
// of GELU(x) is below 2 eps |GELU(x)| for x >= -10 and below 0.8 eps max(1, |x|) everywhere; that
// of GELU'(x) below 2.3 eps (Phi(x) + |x| phi(x)) for x >= -10, and below 1.3 eps everywhere.
//
// For 16-bit activations, which round by 2^-9 or 2^-11, half of the work is enough:
//   Phi(-a) = 2^p(a),  phi(a) = 2^p(a) h(a),  polynomials
// The error of GELU(x) is below 3e-5 |GELU(x)| for x >= -10, that of GELU'(x) below
// 1.5e-4 (Phi(x) + |x| phi(x)).
//
// All coefficients come from fit_gelu.py.
//
// Limits: GELU(+inf) = inf, GELU(-inf) = NaN (it is -inf times 0, as in PyTorch), GELU'(+-inf) =
// NaN, NaN gives NaN. Below x = -13.3, where Phi(x) < 2^-126, Phi(x) is exactly 0.
#pragma once

#include "mills_ratio.h"
#include "pack.h"

namespace convnest::CONVNEST_ISA {
namespace {

constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kInvSqrt2Pi = 0.39894228040143267794;
constexpr float kHalfLog2e = 0.72134752f;      // E = 2^-(a^2 log2(e) / 2)
constexpr float kTwoLn2High = 1.38623046875f;  // of 12 bits: exact when multiplied by n
constexpr float kTwoLn2Low = 6.389236989e-5f;
// |x| stops here, where `scaled` makes Phi exactly 0.
constexpr float kLargest = 13.4f;
// Added to a float of at most 2^22 it leaves its rounded value in the low bits.
constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23

template <class A, int N>
struct GeluAndGrad {
    Pack<A, N> value;
    Pack<A, N> grad;
};

// ---- what it takes of a vector ----

// min(|x|, kLargest), and kLargest for NaN: among integers a NaN is larger than any bound.
template <int N>
CONVNEST_INLINE Pack<float, N> magnitude(const Pack<float, N>& x) {
    const Words most = (Words)(kLargest + Floats{});
    return make_pack<float, N>([&](auto i) CONVNEST_INLINE_LAMBDA {
        const Words bits = (Words)x.v[i] & 0x7fffffffu;
        return (Floats)(bits < most ? bits : most);
    });
}

// r 2^n, where n is the signed number in the low bits of m; 0 below the normal numbers.
template <int N>
CONVNEST_INLINE Pack<float, N> scaled(const Pack<float, N>& r, const Pack<float, N>& m) {
    return make_pack<float, N>([&](auto i) CONVNEST_INLINE_LAMBDA {
        const Integers bits = (Integers)((Words)r.v[i] + ((Words)m.v[i] << 23));
        return (Floats)(bits > 0 ? bits : Integers{});
    });
}

// Phi(x), given tail = Phi(-|x|).
template <int N>
CONVNEST_INLINE Pack<float, N> normal_from_tail(const Pack<float, N>& x,
                                                const Pack<float, N>& tail) {
    return make_pack<float, N>([&](auto i) CONVNEST_INLINE_LAMBDA {
        return x.v[i] < 0.0f ? tail.v[i] : 1.0f - tail.v[i];
    });
}

// a a - square exactly, where square is the rounded a a.
CONVNEST_INLINE Floats rest_of(Floats a, Floats square) {
#if CONVNEST_VECTOR_BYTES == 64
    return (Floats)_mm512_maskz_fmsub_ps(0xffff, (__m512)a, (__m512)a, (__m512)square);
#elif CONVNEST_VECTOR_BYTES == 32
    return (Floats)_mm256_fmsub_ps((__m256)a, (__m256)a, (__m256)square);
#else
    // The products of the halves of a are exact.
    const Floats high = (Floats)((Words)a & 0xfffff000u), low = a - high;
    return ((high * high - square) + 2.0f * high * low) + low * low;
#endif
}

constexpr int kCentres = kVectorBytes == 32 ? 8 : 16;
using Mills = MillsRatio<kCentres>;

// table[i] in every lane, i the low bits of `index`. The permutations are spelled so that the table
// stays in memory: the compiler would keep all of them in registers and spill what it works on.
CONVNEST_INLINE Floats look_up(const float (&table)[kCentres], Words index) {
    Floats r;
#if CONVNEST_VECTOR_BYTES == 64
    asm("vpermps %2, %1, %0" : "=v"(r) : "v"(index), "m"(table));
#elif CONVNEST_VECTOR_BYTES == 32
    asm("vpermps %2, %1, %0" : "=x"(r) : "x"(index), "m"(table));
#else
    for (int i = 0; i < kLanes<float>; ++i) r[i] = table[index[i] % kCentres];
#endif
    return r;
}

// ---- for float32 ----

// Phi(-a) / exp(-a^2 / 2). The first bits of 1 + a, which lies in four binades, tell the centre.
CONVNEST_INLINE Floats mills_ratio(Floats a) {
    const Words index = (Words)(a * Mills::kSlope + 1.0f) >> (23 - Mills::kMantissaBits);
    const Floats d = a - look_up(Mills::kCentre, index);
    Floats r = look_up(Mills::kCoefficients[Mills::kDegree], index);
    unroll<Mills::kDegree>([&](auto i) CONVNEST_INLINE_LAMBDA {
        r = r * d + look_up(Mills::kCoefficients[Mills::kDegree - 1 - i], index);
    });
    return r;
}

template <int N>
struct NormalTail {
    Pack<float, N> tail;     // Phi(-|x|)
    Pack<float, N> density;  // exp(-x^2 / 2)
};

template <int N>
CONVNEST_INLINE NormalTail<N> normal_tail(const Pack<float, N>& x) {
    using F = Pack<float, N>;
    const F a = magnitude(x);
    const F r =
        make_pack<float, N>([&](auto i) CONVNEST_INLINE_LAMBDA { return mills_ratio(a.v[i]); });
    const F square = a * a;
    const F shifted = kRoundMagic - square * kHalfLog2e;
    // E = 2^n exp(-f / 2), |f| <= ln 2
    const F n = shifted - kRoundMagic;
    const F rest = make_pack<float, N>(
        [&](auto i) CONVNEST_INLINE_LAMBDA { return rest_of(a.v[i], square.v[i]); });
    const F f = (n * kTwoLn2High + square) + (n * kTwoLn2Low + rest);
    F q = f * 2.163065123e-05f - 2.616948334e-04f;
    q = q * f + 2.604250406e-03f;
    q = q * f - 2.083303793e-02f;
    q = q * f + 1.249999854e-01f;
    q = q * f - 0.5f;
    q = q * f;
    return {scaled(r * q + r, shifted), scaled(q + 1.0f, shifted)};
}

template <int N>
CONVNEST_INLINE GeluAndGrad<float, N> some_gelu_and_grad(const Pack<float, N>& x) {
    const auto normal = normal_tail(x);
    const auto below = normal_from_tail(x, normal.tail);
    return {x * below, below + x * (normal.density * static_cast<float>(kInvSqrt2Pi))};
}

// In packs that the registers hold.
constexpr int kLongPack = 2;
template <int N>
CONVNEST_INLINE GeluAndGrad<float, N> long_gelu_and_grad(const Pack<float, N>& x) {
    constexpr int kPart = N < kLongPack ? N : kLongPack;
    static_assert(N % kPart == 0);
    GeluAndGrad<float, N> result;
    unroll<N / kPart>([&](auto part) CONVNEST_INLINE_LAMBDA {
        const auto some = some_gelu_and_grad(make_pack<float, kPart>(
            [&](auto i) CONVNEST_INLINE_LAMBDA { return x.v[part * kPart + i]; }));
        unroll<kPart>([&](auto i) CONVNEST_INLINE_LAMBDA {
            result.value.v[part * kPart + i] = some.value.v[i];
            result.grad.v[part * kPart + i] = some.grad.v[i];
        });
    });
    return result;
}

// ---- for 16-bit activations ----

// Phi(-a)
template <int N>
CONVNEST_INLINE Pack<float, N> short_tail(const Pack<float, N>& a) {
    using F = Pack<float, N>;
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
    return scaled(r, shifted);
}

template <int N>
CONVNEST_INLINE GeluAndGrad<float, N> short_gelu_and_grad(const Pack<float, N>& x) {
    using F = Pack<float, N>;
    const F a = magnitude(x);
    const F tail = short_tail(a);
    F h = a * 4.557724218e-06f - 1.677716625e-04f;
    h = h * a + 2.558801846e-03f;
    h = h * a - 2.132340897e-02f;
    h = h * a + 1.088241483e-01f;
    h = h * a + 6.373726313e-01f;
    h = h * a + 7.978040157e-01f;
    const F below = normal_from_tail(x, tail);
    return {x * below, below + x * (tail * h)};
}

// ---- by type ----

// GELU of values that are, or will be, stored as T.
template <class T, int N>
CONVNEST_INLINE GeluAndGrad<Accumulate<T>, N> gelu_and_grad_of(const Pack<Accumulate<T>, N>& x) {
    if constexpr (sizeof(T) == 2) {
        return short_gelu_and_grad(x);
    } else if constexpr (sizeof(T) == 4) {
        return long_gelu_and_grad(x);
    } else {
        // float64 is for gradient checks: the C library, lane by lane.
        GeluAndGrad<double, N> result;
        for (int n = 0; n < N; ++n) {
            for (int i = 0; i < kLanes<double>; ++i) {
                const double value = x.v[n][i], below = 0.5 * __builtin_erfc(-value * kSqrtHalf);
                result.value.v[n][i] = value * below;
                result.grad.v[n][i] =
                    below + value * (__builtin_exp(-0.5 * value * value) * kInvSqrt2Pi);
            }
        }
        return result;
    }
}

// The compiler leaves out what only the derivative takes.
template <class T, int N>
CONVNEST_INLINE Pack<Accumulate<T>, N> gelu_of(const Pack<Accumulate<T>, N>& x) {
    return gelu_and_grad_of<T>(x).value;
}

}  // namespace
}  // namespace convnest::CONVNEST_ISA
