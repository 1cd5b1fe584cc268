// Eight neighbouring channels of a row in a thread's registers, as they came from memory: four
// pairs of 16-bit elements, or eight floats.
#pragma once

#include "common/planes.cuh"

namespace convnest::cuda {

template <class Element>
struct RowVector {
    Octet octet;

    __device__ __forceinline__ float get(int i) const {
        return i % 2 == 0 ? Element::low(octet.pair[i / 2]) : Element::high(octet.pair[i / 2]);
    }
    // Channels past `channels` are zero. kVector: 16-byte aligned, and all eight exist.
    template <bool kVector>
    __device__ __forceinline__ static RowVector load(const std::uint16_t* address, int channels) {
        return {load_octet<kVector>(address, channels)};
    }
    template <bool kVector>
    __device__ __forceinline__ static void store(std::uint16_t* address, const float (&value)[8],
                                                 int channels) {
        Octet packed;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            packed.pair[k] = Element::pack(value[2 * k], value[2 * k + 1]);
        }
        store_octet<kVector>(address, packed, channels);
    }
};

template <>
struct RowVector<Float32> {
    float value[8];

    __device__ __forceinline__ float get(int i) const { return value[i]; }
    template <bool kVector>
    __device__ __forceinline__ static RowVector load(const float* address, int channels) {
        RowVector vector;
        if constexpr (kVector) {
            const auto low = load_global(reinterpret_cast<const uint4*>(address));
            const auto high = load_global(reinterpret_cast<const uint4*>(address) + 1);
            const std::uint32_t bits[8] = {low.x,  low.y,  low.z,  low.w,
                                           high.x, high.y, high.z, high.w};
#pragma unroll
            for (int i = 0; i < 8; ++i) vector.value[i] = bits_to_float(bits[i]);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                vector.value[i] = i < channels ? load_global(address + i) : 0.f;
            }
        }
        return vector;
    }
    template <bool kVector>
    __device__ __forceinline__ static void store(float* address, const float (&value)[8],
                                                 int channels) {
        if constexpr (kVector) {
#pragma unroll
            for (int i = 0; i < 8; i += 4) {
                store_global(reinterpret_cast<float4*>(address + i),
                             make_float4(value[i], value[i + 1], value[i + 2], value[i + 3]));
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (i < channels) store_global(address + i, value[i]);
            }
        }
    }
};

}  // namespace convnest::cuda
