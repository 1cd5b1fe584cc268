// Functions that must be inlined: see simd.h for why.
#pragma once

// Nothing in builds that check addresses: in unrolled code that takes a compiler minutes.
#if !defined(CONVNEST_ALWAYS_INLINE)
#define CONVNEST_ALWAYS_INLINE __attribute__((always_inline))
#endif

#define CONVNEST_INLINE static inline CONVNEST_ALWAYS_INLINE
