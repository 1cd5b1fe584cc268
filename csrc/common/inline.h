// Functions that are shared by host and device, and must be inlined: see simd.h for why.
#pragma once

#if defined(__CUDACC__)
#define CONVNEST_INLINE static __host__ __device__ __forceinline__
#else
#define CONVNEST_INLINE static inline __attribute__((always_inline))
#endif
