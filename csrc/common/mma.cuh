// Warp-level matrix products of 16-bit elements with float accumulators, for sm_80 and newer.
//
// Fragments (PTX manual, "Matrix fragments for mma.m16n8k16"); lane = 4 g + t, g < 8, t < 4:
//     A 16×16, row:  a[0] = A[g][2t..], a[1] = A[g + 8][2t..], a[2], a[3] = the same at k + 8
//     B 16×8,  col:  b[0] = B[2t..][g], b[1] = B[2t + 8..][g]
//     C, D 16×8:     d[0..1] = D[g][2t..], d[2..3] = D[g + 8][2t..]
#pragma once

#include "common/element.cuh"

#if !defined(__CUDACC__)
#include "warp_matrix.h"
#endif

namespace convnest::cuda {

using FragmentA = std::uint32_t[4];
using FragmentB = std::uint32_t[2];
using FragmentC = float[4];

// d = a·b + c. d and c may be different registers, which moves a ring of accumulators for nothing.
// The only asm here that is not volatile: it reads and writes registers alone.
template <class Element>
__device__ __forceinline__ void mma(FragmentC& d, const FragmentA& a, const FragmentB& b,
                                    const FragmentC& c);

#if defined(__CUDACC__)
#define CONVNEST_MMA(TYPE)                                                                        \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                    \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                \
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                          \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), \
          "f"(c[2]), "f"(c[3]))
#else
#define CONVNEST_MMA(TYPE) emulation::mma_16x8x16<Element>(d, a, b, c)
#endif

template <>
__device__ __forceinline__ void mma<BFloat16>(FragmentC& d, const FragmentA& a, const FragmentB& b,
                                              const FragmentC& c) {
    using Element [[maybe_unused]] = BFloat16;
    CONVNEST_MMA("bf16");
}

template <>
__device__ __forceinline__ void mma<Float16>(FragmentC& d, const FragmentA& a, const FragmentB& b,
                                             const FragmentC& c) {
    using Element [[maybe_unused]] = Float16;
    CONVNEST_MMA("f16");
}

#undef CONVNEST_MMA

// Four 8×8 matrices of 16-bit elements; lane 8 i + j names row j of matrix i, 16 aligned bytes.
// Matrix i goes to r[i]: lane 4 g + t gets elements [g][2t], [g][2t + 1], or with kTransposed
// [2t][g], [2t + 1][g]. Volatile and clobbering memory: it must not leave its barriers.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(std::uint32_t (&r)[4], const void* row) {
#if defined(__CUDACC__)
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    if constexpr (kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    }
#else
    emulation::load_matrices(r, row, kTransposed);
#endif
}

}  // namespace convnest::cuda
