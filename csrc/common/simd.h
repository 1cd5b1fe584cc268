// SIMD vectors of the instruction set that a translation unit is compiled for.
//
// Every `<stem>_cpu.cpp` is compiled once per instruction set, with CONVNEST_ISA (a namespace) and
// CONVNEST_VECTOR_BYTES defined. All that is in here has internal linkage: a function with AVX-512
// code in it that the linker could pick for all would crash elsewhere. For the same reason these
// translation units use nothing from std:: that has code.
#pragma once

#include <cstdint>
#include <utility>

#include "dtype.h"
#include "inline.h"

#if CONVNEST_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

namespace convnest::CONVNEST_ISA {
namespace {

constexpr int kVectorBytes = CONVNEST_VECTOR_BYTES;

template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef std::uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef std::int32_t Integers __attribute__((vector_size(kVectorBytes)));
typedef std::uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
    using type = Floats;
};
template <>
struct VecOf<double> {
    using type = Doubles;
};
template <>
struct VecOf<std::uint32_t> {
    using type = Words;
};
template <class A>
using Vec = typename VecOf<A>::type;

// ---- loops that are unrolled at compile time ----

template <int I>
struct Constant {
    static constexpr int value = I;
    constexpr operator int() const { return I; }
};

template <int... I, class F>
CONVNEST_INLINE void unroll_sequence(std::integer_sequence<int, I...>, F&& f) {
    (f(Constant<I>{}), ...);
}

template <int N, class F>
CONVNEST_INLINE void unroll(F&& f) {
    unroll_sequence(std::make_integer_sequence<int, N>{}, f);
}

// A lambda that must be inlined: registers are kept across its calls.
#define CONVNEST_INLINE_LAMBDA CONVNEST_ALWAYS_INLINE

// ---- 16-bit floats ----

// One instruction; of the conversion below GCC 12 makes one for each half, and puts these together.
// (The forms with a full mask, here and below: GCC 12 warns of its own headers in the plain ones.)
CONVNEST_INLINE Words widen_bits(Halves bits) {
#if CONVNEST_VECTOR_BYTES == 64
    return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits);
#elif CONVNEST_VECTOR_BYTES == 32
    return (Words)_mm256_cvtepu16_epi32((__m128i)bits);
#else
    return __builtin_convertvector(bits, Words);
#endif
}

CONVNEST_INLINE Floats widen(Halves bits, BFloat16) { return (Floats)(widen_bits(bits) << 16); }

CONVNEST_INLINE Halves narrow(Floats x, BFloat16) {
    const Words bits = (Words)x;
    // Round to nearest, ties to even; a NaN stays one (adding would carry into its sign).
    const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const Words quiet = bits | 0x400000u;
    const Words chosen = x != x ? quiet : rounded;
    return __builtin_convertvector(chosen >> 16, Halves);
}

// The same within a computation, where a subnormal number may become 0: one instruction, if there
// is one.
#if defined(__AVX512BF16__)
CONVNEST_INLINE Halves narrow_normal(Floats x, BFloat16) {
    return (Halves)_mm512_cvtneps_pbh((__m512)x);
}
#else
CONVNEST_INLINE Halves narrow_normal(Floats x, BFloat16) { return narrow(x, BFloat16{}); }
#endif

#if CONVNEST_VECTOR_BYTES == 64
CONVNEST_INLINE Floats widen(Halves bits, Float16) {
    return (Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
}
CONVNEST_INLINE Halves narrow(Floats x, Float16) {
    return (Halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
}
#elif CONVNEST_VECTOR_BYTES == 32
CONVNEST_INLINE Floats widen(Halves bits, Float16) {
    return (Floats)_mm256_cvtph_ps((__m128i)bits);
}
CONVNEST_INLINE Halves narrow(Floats x, Float16) {
    return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
}
#else
CONVNEST_INLINE Floats widen(Halves bits, Float16) {
    const Words wide = __builtin_convertvector(bits, Words);
    const Words sign = (wide & 0x8000u) << 16;
    const Words shifted = (wide & 0x7fffu) << 13;
    // Times 2^112 puts the exponent right, for subnormal numbers too.
    const Words finite = (Words)((Floats)shifted * 0x1p112f);
    const Words special = shifted | 0x7f800000u;
    return (Floats)(sign | (shifted >= 0x0f800000u ? special : finite));
}
CONVNEST_INLINE Halves narrow(Floats x, Float16) {
    const Words sign = (Words)x & 0x80000000u;
    const Words bits = (Words)x ^ sign;
    // Subnormal results: adding 0.5 lets the float adder round at bit 2^-24.
    const Words subnormal = (Words)((Floats)bits + 0.5f) - 0x3f000000u;
    const Words normal = (bits + 0xc8000fffu + ((bits >> 13) & 1u)) >> 13;
    const Words finite = bits < 0x38800000u ? subnormal : normal;
    const Words nan = 0x7e00u + (bits & 0u);
    const Words infinite = 0x7c00u + (bits & 0u);
    const Words special = bits > 0x7f800000u ? nan : infinite;
    return __builtin_convertvector((bits >= 0x47800000u ? special : finite) | (sign >> 16), Halves);
}
#endif

CONVNEST_INLINE Halves narrow_normal(Floats x, Float16) { return narrow(x, Float16{}); }

template <class A>
CONVNEST_INLINE Vec<A> load(const A* p) {
    Vec<A> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <class A>
CONVNEST_INLINE void store(A* p, Vec<A> v) {
    __builtin_memcpy(p, &v, sizeof v);
}

// Loads that convert, and stores.
CONVNEST_INLINE Floats load_from(const float* p) { return load(p); }
CONVNEST_INLINE Doubles load_from(const double* p) { return load(p); }
CONVNEST_INLINE void store_to(float* p, Floats v) { store(p, v); }
CONVNEST_INLINE void store_to(double* p, Doubles v) { store(p, v); }

template <class T>
CONVNEST_INLINE Floats load_from(const T* p) {
    Halves bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return widen(bits, T{});
}

template <class T>
CONVNEST_INLINE void store_to(T* p, Floats v) {
    const Halves bits = narrow(v, T{});
    __builtin_memcpy(p, &bits, sizeof bits);
}

// The sum over all lanes, in a fixed order: halves are added until one lane is left.
template <class V>
CONVNEST_INLINE auto sum_halves(V v) {
    constexpr int kLeft = sizeof(V) / sizeof(v[0]);
    if constexpr (kLeft == 2) {
        return v[0] + v[1];
    } else {
        typedef decltype(+v[0]) Scalar;
        typedef Scalar Half __attribute__((vector_size(sizeof(V) / 2)));
        Half low, high;
        __builtin_memcpy(&low, &v, sizeof low);
        __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
        return sum_halves(low + high);
    }
}
template <class A>
CONVNEST_INLINE A lane_sum(Vec<A> v) {
    return sum_halves(v);
}

CONVNEST_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
CONVNEST_INLINE double square_root(double x) { return __builtin_sqrt(x); }

}  // namespace
}  // namespace convnest::CONVNEST_ISA
