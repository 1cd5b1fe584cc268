// Functions that are shared by host and device, and must be inlined: see simd.h for why.
#pragma once

// Nothing in builds that check addresses: in unrolled code that takes a compiler minutes.
#if !defined(CONVNEST_ALWAYS_INLINE)
#define CONVNEST_ALWAYS_INLINE __attribute__((always_inline))
#endif

#if defined(__CUDACC__)
#define CONVNEST_INLINE static __host__ __device__ __forceinline__
#else
#define CONVNEST_INLINE static inline CONVNEST_ALWAYS_INLINE
#endif
