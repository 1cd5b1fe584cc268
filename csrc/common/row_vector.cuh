// Neighbouring channels of a row in a thread's registers, 8 or 4 of them, as they came from memory:
// pairs of 16-bit elements, or floats. And how a row is dealt to threads.
#pragma once

#include "common/planes.cuh"

namespace convnest::cuda {

template <int kWidth>
__device__ __forceinline__ void load_words(const void* address, std::uint32_t (&word)[kWidth]) {
    static_assert(kWidth == 2 || kWidth % 4 == 0);
    if constexpr (kWidth == 2) {
        const auto v = load_global(static_cast<const uint2*>(address));
        word[0] = v.x, word[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < kWidth; i += 4) {
            const uint4 v = load_global(static_cast<const uint4*>(address) + i / 4);
            word[i] = v.x, word[i + 1] = v.y, word[i + 2] = v.z, word[i + 3] = v.w;
        }
    }
}

template <int kWidth>
__device__ __forceinline__ void store_words(void* address, const std::uint32_t (&word)[kWidth]) {
    static_assert(kWidth == 2 || kWidth % 4 == 0);
    if constexpr (kWidth == 2) {
        store_global(static_cast<uint2*>(address), make_uint2(word[0], word[1]));
    } else {
#pragma unroll
        for (int i = 0; i < kWidth; i += 4) {
            store_global(static_cast<uint4*>(address) + i / 4,
                         make_uint4(word[i], word[i + 1], word[i + 2], word[i + 3]));
        }
    }
}

// kVector: the address is aligned to the vector (16 bytes at most), and all channels exist. Else
// channels past `channels` read as zero, and are not written.
template <class Element, int kWidth>
struct RowVector {
    std::uint32_t pair[kWidth / 2];

    // Values of this type, or of another one of 16 bits in the same registers.
    template <class Other = Element>
    __device__ __forceinline__ float get(int i) const {
        return i % 2 == 0 ? Other::low(pair[i / 2]) : Other::high(pair[i / 2]);
    }
    template <class Other = Element>
    __device__ __forceinline__ void set(const float (&value)[kWidth]) {
#pragma unroll
        for (int k = 0; k < kWidth / 2; ++k) {
            pair[k] = Other::pack(value[2 * k], value[2 * k + 1]);
        }
    }
    template <bool kVector>
    __device__ __forceinline__ static RowVector load(const std::uint16_t* address, int channels) {
        RowVector vector;
        if constexpr (kVector) {
            load_words<kWidth / 2>(address, vector.pair);
        } else {
#pragma unroll
            for (int k = 0; k < kWidth / 2; ++k) {
                const std::uint32_t low = 2 * k < channels ? load_global(address + 2 * k) : 0;
                const std::uint32_t high =
                    2 * k + 1 < channels ? load_global(address + 2 * k + 1) : 0;
                vector.pair[k] = low | high << 16;
            }
        }
        return vector;
    }
    template <bool kVector>
    __device__ __forceinline__ static void store(std::uint16_t* address,
                                                 const float (&value)[kWidth], int channels) {
        RowVector vector;
        vector.set(value);
        if constexpr (kVector) {
            store_words<kWidth / 2>(address, vector.pair);
        } else {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                if (i < channels) {
                    store_global(address + i,
                                 static_cast<std::uint16_t>(vector.pair[i / 2] >> (i % 2 * 16)));
                }
            }
        }
    }
};

template <int kWidth>
struct RowVector<Float32, kWidth> {
    std::uint32_t bits[kWidth];

    template <class = Float32>
    __device__ __forceinline__ float get(int i) const {
        return bits_to_float(bits[i]);
    }
    template <class = Float32>
    __device__ __forceinline__ void set(const float (&value)[kWidth]) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) bits[i] = float_to_bits(value[i]);
    }
    template <bool kVector>
    __device__ __forceinline__ static RowVector load(const float* address, int channels) {
        RowVector vector;
        if constexpr (kVector) {
            load_words<kWidth>(address, vector.bits);
        } else {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                vector.bits[i] = i < channels ? float_to_bits(load_global(address + i)) : 0;
            }
        }
        return vector;
    }
    template <bool kVector>
    __device__ __forceinline__ static void store(float* address, const float (&value)[kWidth],
                                                 int channels) {
        if constexpr (kVector) {
            RowVector vector;
            vector.set(value);
            store_words<kWidth>(address, vector.bits);
        } else {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                if (i < channels) store_global(address + i, value[i]);
            }
        }
    }
};

// Channels of a float parameter; `otherwise` where there is none.
template <bool kVector, int kWidth>
__device__ __forceinline__ void load_parameter(const float* parameter, int channel, int channels,
                                               float otherwise, float (&value)[kWidth]) {
    if (parameter == nullptr) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) value[i] = otherwise;
        return;
    }
    using Vector = RowVector<Float32, kWidth>;
    const Vector vector = Vector::template load<kVector>(parameter + channel, channels);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) value[i] = vector.get(i);
}

template <class... Pointers>
bool all_aligned(const Pointers*... pointers) {
    return ((reinterpret_cast<std::uintptr_t>(pointers) % 16 == 0) && ...);
}

// A row's vectors are dealt in turn to `threads()` neighbouring threads, a power of two, `vectors`
// at most to each: thread t has vectors t, t + threads(), ...
struct RowCut {
    int shift, vectors;

    __host__ __device__ int threads() const { return 1 << shift; }
};

// The cut that leaves the fewest lanes idle; 12·C is 3·2^k channels, so that 5 vectors to a thread
// leave a tenth. Of equal ones that with the most threads, whose accesses are the longest.
inline RowCut cut_row(int C, int width, int most_vectors, int most_threads) {
    const int vectors = ceil_div(C, width);
    RowCut best{0, 0};
    for (int shift = 0; 1 << shift <= most_threads; ++shift) {
        const RowCut cut{shift, ceil_div(vectors, 1 << shift)};
        if (cut.vectors > most_vectors) continue;
        if (best.vectors == 0 || cut.threads() * cut.vectors <= best.threads() * best.vectors) {
            best = cut;
        }
        if (cut.vectors == 1) break;
    }
    return best;
}

// Sum over the lanes of a row that lie in this warp: `lanes` neighbours, a power of two.
__device__ __forceinline__ float lane_sum(float value, int lanes) {
#pragma unroll
    for (int bits = kWarpSize / 2; bits > 0; bits /= 2) {
        if (bits < lanes) value += __shfl_xor_sync(kFullWarp, value, bits);
    }
    return value;
}

__device__ __forceinline__ float warp_sum(float value) { return lane_sum(value, kWarpSize); }

}  // namespace convnest::cuda
