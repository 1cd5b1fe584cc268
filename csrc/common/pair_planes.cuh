// Channel-major planes as in planes.cuh, filled by 512 threads: a thread has 2 pixels × 8 channels.
//
// A row is 16 channels of 128 pixels. A plane holds one channel, in 17 blocks of 16 bytes; pixel v
// lies at position v + lead, where the lead is 4 or 8, so that what a matrix load takes begins at a
// block: windows of 16 pixels from 8m − 8 want a lead of 8, windows from 8m − 4 one of 4, tiles of
// 8 pixels the one or the other. The planes of channels 8–15 lie 64 bytes further, which puts
// a warp's 4-byte accesses (16 pairs × 2 halves) into 32 banks.
#pragma once

#include "common/planes.cuh"

namespace convnest::cuda {

constexpr int kPairThreads = 512;
constexpr int kPairsOfRow = 64;
constexpr int kPairPlaneBytes = 17 * 16;
constexpr int kPairHalfBytes = 8 * kPairPlaneBytes + 64;
constexpr int kPairRowBytes = kPairHalfBytes + 8 * kPairPlaneBytes;

struct PairPlanes {
    unsigned char bytes[kStageRows * kPairRowBytes];
};

__device__ __forceinline__ constexpr int pair_plane(int channel) {
    return (channel >> 3) * kPairHalfBytes + (channel & 7) * kPairPlaneBytes;
}

// What a thread fills and drains: pixels v = 2·pair − 4 and v + 1 of channels 8·half .. 8·half + 7.
struct PairRole {
    int half, pair, row;

    __device__ __forceinline__ explicit PairRole(int thread, int row)
        : half(thread & 1), pair(thread >> 1 & (kPairsOfRow - 1)), row(row) {}

    // Its cell of channel 8·half + i in a row of planes with this lead.
    template <int kLead>
    __device__ __forceinline__ int cell(int i) const {
        return half * kPairHalfBytes + i * kPairPlaneBytes + pair * 4 + (kLead - kLeadPixels) * 2;
    }
};

// A lane's ldmatrix row addresses: of windows for fragment A (tiles 0–7, 8–15, then the same of
// columns 8–15), ...
__device__ __forceinline__ int pair_window(int channel, int lane) {
    return pair_plane(channel) + ((lane & 7) + (lane >> 3 & 1) * 8 + (lane >> 4)) * 16;
}
// ... transposed (columns 0–7, 8–15 of tiles 0–7, then of tiles 8–15), ...
__device__ __forceinline__ int pair_window_transposed(int channel, int lane) {
    return pair_plane(channel) + ((lane & 7) + (lane >> 4) * 8 + (lane >> 3 & 1)) * 16;
}
// ... and of tiles 0–7, 8–15 of a row, then of the row below, from block `first` on.
__device__ __forceinline__ int pair_tiles(int channel, int lane, int first) {
    return (lane >> 4) * kPairRowBytes + pair_plane(channel) +
           ((lane & 7) + (lane >> 3 & 1) * 8 + first) * 16;
}

// Which pixels of a stage count, as elements 1 and 0, one plane for all channels: with a lead of 4,
// for tiles of du, and with one of 8.
struct PairMasks {
    unsigned char rows[kStageRows][2][kPairPlaneBytes];

    template <class Element>
    __device__ __forceinline__ void store(const PairRole& role, std::uint32_t mask) {
        store_shared(rows[role.row][role.half] + role.pair * 4 + role.half * 8,
                     Element::kOnes & mask);
    }
    __device__ __forceinline__ const unsigned char* tiles(int row, int lane) const {
        return rows[row][lane >> 3 & 1] + ((lane & 7) + (lane >> 4) * 8 + (lane >> 3 & 1)) * 16;
    }
};

// As Staging: a thread's 2 pixels × 8 channels of the next stage, on their way.
struct PairStaging {
    uint4 pixels[2][kPairThreads];

    __device__ __forceinline__ void fetch(int thread, int i, const std::uint16_t* address,
                                          bool exists) {
        async_copy16(&pixels[i][thread], address, exists);
    }
    __device__ __forceinline__ Octet take(int thread, int i) const {
        const auto v = load_shared<uint4>(&pixels[i][thread]);
        return {{v.x, v.y, v.z, v.w}};
    }
};

// A pair's pixel offsets (PixelQuad), as QuadOffsets.
struct PairOffsets {
    uint2 pairs[kPairsOfRow];

    __device__ __forceinline__ void store(const PixelQuad& quad, const PairRole& role) {
        if (role.row != 0 || role.half != 0) return;
        const int i = role.pair & 1;
        store_shared(&pairs[role.pair], i ? make_uint2(quad.offset[2], quad.offset[3])
                                          : make_uint2(quad.offset[0], quad.offset[1]));
    }
    __device__ __forceinline__ void load(std::uint32_t (&offset)[2], const PairRole& role) const {
        const auto pair = load_shared<uint2>(&pairs[role.pair]);
        offset[0] = pair.x, offset[1] = pair.y;
    }
};

// mean and rstd of a stage, as StageStatistics: one of a pair's two threads fetches the means, the
// other rstd.
struct PairStatistics {
    float2 pairs[2][kStageRows][kPairsOfRow];

    __device__ __forceinline__ void fetch(const PairRole& role, int i, const float* mean,
                                          const float* rstd, std::uint32_t pixel, bool exists) {
        float* pair = reinterpret_cast<float*>(&pairs[role.half][role.row][role.pair]);
        async_copy_float(pair + i, (role.half ? rstd : mean) + pixel, exists);
    }
    __device__ __forceinline__ float2 load(int which, const PairRole& role) const {
        return load_shared<float2>(&pairs[which][role.row][role.pair]);
    }
};

// A stage's rstd from its fill to its drain.
struct PairScales {
    float2 pairs[kStageRows][kPairsOfRow];

    __device__ __forceinline__ void store(const PairRole& role, float2 rstd) {
        if (role.half == 0) store_shared(&pairs[role.row][role.pair], rstd);
    }
    __device__ __forceinline__ float2 load(const PairRole& role) const {
        return load_shared<float2>(&pairs[role.row][role.pair]);
    }
};

}  // namespace convnest::cuda
