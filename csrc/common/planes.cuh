// Channel-major planes in shared memory: the transposed image rows that the tensor cores read.
//
// A stage is 4 virtual rows of 16 channels. One plane holds one channel of one row: position
// p = v + 4 of pixel v as a 16-bit element, 128 positions filled, then a block of zeros that the
// last tile's window reaches into. Plane 2i + o holds channel 8o + i.
//
// 256 threads fill a stage: thread (row r, quad q, half o) transposes the 4 pixels p = 4q .. 4q + 3
// of channels 8o .. 8o + 7 in its registers and owns these cells; it drains the same cells.
//
// A plane takes 20 blocks of 16 bytes, 17 of them used: with that stride the fill's 8-byte stores,
// the drain's 8-byte loads, ldmatrix and the tensor cores' 4-byte stores are free of bank
// conflicts (tests/test_cuda_shared_banks.py holds the address model).
#pragma once

#include <type_traits>

#include "common/canvas.cuh"
#include "common/element.cuh"
#include "common/memory.cuh"

namespace convnest::cuda {

constexpr int kStageRows = 4;
constexpr int kBlockChannels = 16;
constexpr int kThreads = 256;
// Blocks that are to share an SM, and so 128 registers a thread. From sm_120 on shared memory has
// room for one, which may then take them all.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kBlocksPerSm = 1;
#else
constexpr int kBlocksPerSm = 2;
#endif
template <int K, bool kVector>
constexpr int kMinBlocks = K <= 7 && kVector ? kBlocksPerSm : 1;
constexpr int kWarpChannels = kBlockChannels / (kThreads / kWarpSize);
constexpr int kPlaneBytes = 20 * 16;
constexpr int kPlaneRowBytes = kBlockChannels * kPlaneBytes;
constexpr int kZeroBlock = 16;  // index of the 16-byte block of zeros in a plane

struct Planes {
    unsigned char bytes[kStageRows * kPlaneRowBytes];
};
static_assert(sizeof(Planes) == 20480);

__device__ __forceinline__ constexpr int plane_of(int channel) {
    return (channel & 7) * 2 + (channel >> 3);
}

// The plane of channel `c` of a warp: its first channel is even, so that they are neighbours.
__device__ __forceinline__ int warp_plane(int warp, int c) {
    static_assert(kWarpChannels == 2);
    return plane_of(warp * kWarpChannels) + 2 * c;
}

// What a thread fills and drains.
struct Role {
    int half, quad, row;

    __device__ __forceinline__ explicit Role(int thread)
        : half(thread & 1), quad(thread >> 1 & 31), row(thread >> 6) {}

    // Its 4 pixels of channel 8·half + i.
    __device__ __forceinline__ int cell(int i) const {
        return row * kPlaneRowBytes + (2 * i + half) * kPlaneBytes + quad * 8;
    }
};

__device__ __forceinline__ void clear_zero_blocks(Planes& planes, int thread) {
    if (thread < kStageRows * kBlockChannels) {
        store_shared(planes.bytes + thread * kPlaneBytes + kZeroBlock * 16, make_uint4(0, 0, 0, 0));
    }
}

// Where lane's ldmatrix row address starts in a plane: matrices 0 and 1 are tiles 0–7 and
// 8–15 of window columns 0–7, matrices 2 and 3 the same tiles of columns 8–15 (the next block).
__device__ __forceinline__ int window_address(int plane, int lane) {
    const int tile = (lane & 7) + (lane >> 3 & 1) * 8;
    return plane * kPlaneBytes + (tile + (lane >> 4)) * 16;
}

// Reads 8 channels of a pixel; channels past `channels` are zero. kVector: 16-byte aligned, and all
// eight exist.
template <bool kVector>
__device__ __forceinline__ Octet load_octet(const std::uint16_t* address, int channels) {
    Octet octet;
    if constexpr (kVector) {
        const uint4 v = load_global(reinterpret_cast<const uint4*>(address));
        octet.pair[0] = v.x, octet.pair[1] = v.y, octet.pair[2] = v.z, octet.pair[3] = v.w;
    } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const std::uint32_t low = 2 * k < channels ? load_global(address + 2 * k) : 0;
            const std::uint32_t high = 2 * k + 1 < channels ? load_global(address + 2 * k + 1) : 0;
            octet.pair[k] = low | high << 16;
        }
    }
    return octet;
}

template <bool kVector>
__device__ __forceinline__ void store_octet(std::uint16_t* address, const Octet& octet,
                                            int channels) {
    if constexpr (kVector) {
        store_global(reinterpret_cast<uint4*>(address),
                     make_uint4(octet.pair[0], octet.pair[1], octet.pair[2], octet.pair[3]));
    } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (2 * k < channels) {
                store_global(address + 2 * k, static_cast<std::uint16_t>(octet.pair[k]));
            }
            if (2 * k + 1 < channels) {
                store_global(address + 2 * k + 1, static_cast<std::uint16_t>(octet.pair[k] >> 16));
            }
        }
    }
}

// A quad's pixel offsets (PixelQuad), in shared memory to spare registers. A block-wide barrier
// stands between store and load.
struct QuadOffsets {
    uint4 quads[32];

    __device__ __forceinline__ void store(const PixelQuad& quad, const Role& role) {
        if (role.row != 0 || role.half != 0) return;
        store_shared(&quads[role.quad],
                     make_uint4(quad.offset[0], quad.offset[1], quad.offset[2], quad.offset[3]));
    }
    __device__ __forceinline__ void load(std::uint32_t (&offset)[4], const Role& role) const {
        const auto quad = load_shared<uint4>(&quads[role.quad]);
        offset[0] = quad.x, offset[1] = quad.y, offset[2] = quad.z, offset[3] = quad.w;
    }
};

// A mask of 16-bit elements for pixels 2j, 2j + 1 of a quad.
__device__ __forceinline__ std::uint32_t pixel_mask(unsigned present, int j) {
    return (present >> (2 * j) & 1 ? 0xffffu : 0u) |
           (present >> (2 * j + 1) & 1 ? 0xffff0000u : 0u);
}

// Channels 2k, 2k + 1 of the 4 pixels, from NHWC registers to planes, and back.
__device__ __forceinline__ void split_pair(const Octet (&octets)[4], int k, uint2& low,
                                           uint2& high) {
    low = make_uint2(join_low(octets[0].pair[k], octets[1].pair[k]),
                     join_low(octets[2].pair[k], octets[3].pair[k]));
    high = make_uint2(join_high(octets[0].pair[k], octets[1].pair[k]),
                      join_high(octets[2].pair[k], octets[3].pair[k]));
}

// All 8 channels of the quad to planes.
__device__ __forceinline__ void store_quad(const Octet (&octets)[4], const Role& role,
                                           Planes& planes) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        uint2 low, high;
        split_pair(octets, k, low, high);
        store_shared(planes.bytes + role.cell(2 * k), low);
        store_shared(planes.bytes + role.cell(2 * k + 1), high);
    }
}

// A row in a gap: zeros, and no arithmetic. The rows of a warp's threads are the same.
__device__ __forceinline__ void clear_quad(const Role& role, Planes& planes) {
#pragma unroll
    for (int i = 0; i < 8; ++i) store_shared(planes.bytes + role.cell(i), make_uint2(0, 0));
}

__device__ __forceinline__ void join_pair(uint2 low, uint2 high, int k, Octet (&octets)[4]) {
    octets[0].pair[k] = join_low(low.x, high.x);
    octets[1].pair[k] = join_high(low.x, high.x);
    octets[2].pair[k] = join_low(low.y, high.y);
    octets[3].pair[k] = join_high(low.y, high.y);
}

// `pixel` rows of `row_bytes` from a tensor's first pixel: one wide multiply-add.
template <class T>
__device__ __forceinline__ T* at_pixel(T* tensor, std::uint32_t pixel, std::uint32_t row_bytes) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(tensor) +
                                static_cast<std::uint64_t>(pixel) * row_bytes);
}

// A thread's 4 pixels × 8 channels of the next stage, on their way from global memory while the
// tensor cores work on this one; in shared memory, for registers are what these kernels lack.
// Thread-private: each thread waits for its own copies (async_copy_wait) and needs no barrier.
struct Staging {
    uint4 pixels[4][kThreads];

    // Zeros for a pixel that does not exist; nothing is read then.
    template <bool kVector>
    __device__ __forceinline__ void fetch(int thread, int i, const std::uint16_t* address,
                                          int channels, bool exists) {
        if constexpr (kVector) {
            async_copy16(&pixels[i][thread], address, exists);
        } else {
            const Octet octet = load_octet<false>(address, exists ? channels : 0);
            store_shared(&pixels[i][thread],
                         make_uint4(octet.pair[0], octet.pair[1], octet.pair[2], octet.pair[3]));
        }
    }

    __device__ __forceinline__ void take(Octet (&octets)[4], int thread) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const auto v = load_shared<uint4>(&pixels[i][thread]);
            octets[i].pair[0] = v.x, octets[i].pair[1] = v.y;
            octets[i].pair[2] = v.z, octets[i].pair[3] = v.w;
        }
    }
};
static_assert(sizeof(Staging) == 16384);

}  // namespace convnest::cuda
