// The element types. The two of 16 bits come as pairs packed into 32-bit registers: the low half is
// the element with the lower index. Arithmetic is in float; packing rounds to nearest even.
#pragma once

#include "common/launch.cuh"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <cstring>
#endif

namespace convnest::cuda {

__device__ __forceinline__ float bits_to_float(std::uint32_t bits) {
#if defined(__CUDACC__)
    return __uint_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

__device__ __forceinline__ std::uint32_t float_to_bits(float value) {
#if defined(__CUDACC__)
    return __float_as_uint(value);
#else
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

// Bytes of {b, a} picked by the selector's nibbles: __byte_perm, PRMT.
__device__ __forceinline__ std::uint32_t permute_bytes(std::uint32_t a, std::uint32_t b,
                                                       std::uint32_t selector) {
#if defined(__CUDACC__)
    return __byte_perm(a, b, selector);
#else
    const std::uint64_t bytes = static_cast<std::uint64_t>(b) << 32 | a;
    std::uint32_t picked = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned from = selector >> (4 * i) & 7;
        picked |= static_cast<std::uint32_t>(bytes >> (8 * from) & 0xff) << (8 * i);
    }
    return picked;
#endif
}

__device__ __forceinline__ std::uint32_t join_low(std::uint32_t a, std::uint32_t b) {
    return permute_bytes(a, b, 0x5410);
}

__device__ __forceinline__ std::uint32_t join_high(std::uint32_t a, std::uint32_t b) {
    return permute_bytes(a, b, 0x7632);
}

struct BFloat16 {
    using Storage = std::uint16_t;
    static constexpr std::uint32_t kOnes = 0x3f803f80u;  // a pair
    __device__ __forceinline__ static float widen_one(Storage bits) { return low(bits); }
    __device__ __forceinline__ static Storage round_one(float value) {
        return static_cast<Storage>(pack(value, 0.f));
    }
    __device__ __forceinline__ static float low(std::uint32_t pair) {
        return bits_to_float(pair << 16);
    }
    __device__ __forceinline__ static float high(std::uint32_t pair) {
        return bits_to_float(pair & 0xffff0000u);
    }
    __device__ __forceinline__ static std::uint32_t pack(float low, float high) {
#if defined(__CUDACC__)
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const std::uint32_t*>(&pair);
#else
        return round(low) | round(high) << 16;
#endif
    }
    __device__ __forceinline__ static std::uint32_t add(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDACC__)
        const __nv_bfloat162 sum = __hadd2(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                           *reinterpret_cast<const __nv_bfloat162*>(&b));
        return *reinterpret_cast<const std::uint32_t*>(&sum);
#else
        return pack(low(a) + low(b), high(a) + high(b));
#endif
    }

#if !defined(__CUDACC__)
    static std::uint32_t round(float value) {
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        if (value != value) return 0x7fff;
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
#endif
};

struct Float16 {
    using Storage = std::uint16_t;
    static constexpr std::uint32_t kOnes = 0x3c003c00u;  // a pair
    __device__ __forceinline__ static float widen_one(Storage bits) { return low(bits); }
    __device__ __forceinline__ static Storage round_one(float value) {
        return static_cast<Storage>(pack(value, 0.f));
    }
    __device__ __forceinline__ static float low(std::uint32_t pair) {
#if defined(__CUDACC__)
        return __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
#else
        return widen(static_cast<std::uint16_t>(pair));
#endif
    }
    __device__ __forceinline__ static float high(std::uint32_t pair) {
#if defined(__CUDACC__)
        return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
#else
        return widen(static_cast<std::uint16_t>(pair >> 16));
#endif
    }
    __device__ __forceinline__ static std::uint32_t pack(float low, float high) {
#if defined(__CUDACC__)
        const __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<const std::uint32_t*>(&pair);
#else
        return round(low) | round(high) << 16;
#endif
    }
    __device__ __forceinline__ static std::uint32_t add(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDACC__)
        const __half2 sum =
            __hadd2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
        return *reinterpret_cast<const std::uint32_t*>(&sum);
#else
        return pack(low(a) + low(b), high(a) + high(b));
#endif
    }

#if !defined(__CUDACC__)
    static float widen(std::uint16_t bits) {
        _Float16 value;
        std::memcpy(&value, &bits, sizeof value);
        return static_cast<float>(value);
    }
    static std::uint32_t round(float value) {
        const _Float16 half = static_cast<_Float16>(value);
        std::uint16_t bits;
        std::memcpy(&bits, &half, sizeof bits);
        return bits;
    }
#endif
};

// Float as an element: for the kernels on the FMA units, which take single elements alone.
struct Float32 {
    using Storage = float;
    __device__ __forceinline__ static float widen_one(float value) { return value; }
    __device__ __forceinline__ static float round_one(float value) { return value; }
};

// Eight consecutive elements, as one 16-byte access moves them.
struct Octet {
    std::uint32_t pair[4];
};

}  // namespace convnest::cuda
