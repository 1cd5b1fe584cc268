// Small maps (H and W up to 8) on the tensor cores: the image is the tile.
//
//     out[m; y, n] = Σ_{y', j} In[m; y', j] · T_ky[j, n],   T_ky[j, n] = w[ky, j − n + R],
//                                                           ky = y' − y + R
//
// M: 16 images m of the batch, N: the 8 pixels n of output row y, K: two input rows y', 8 pixels j
// each. No neighbour lies outside of the window, so that no gap stands between images, and the band
// fits for every K. The windows of all input rows are loaded once; a pair of rows that starts at
// kernel row k0 meets the pair of bands (T_k0, T_k0+1), zeros beyond the kernel.
//
// A plane holds one channel: [row][image][8 pixels] as 16-bit elements, so that a matrix of
// ldmatrix is 8 images of a row, and four of them lie one behind the other. Plane 2i + o holds
// channel 8o + i, as in planes.cuh. The 64 bytes behind each plane put the two halves of the
// channels on different banks when a thread fills or drains (tests/test_cuda_shared_banks.py).
#pragma once

#include "common/gelu_norm.cuh"
#include "common/mma.cuh"

namespace convnest::cuda {

constexpr int kMapSide = 8;     // the largest height and width
constexpr int kMapImages = 16;  // of a tile
constexpr int kMapRowBytes = kMapImages * kMapSide * 2;
constexpr int kMapPlaneBytes = kMapSide * kMapRowBytes + 64;
constexpr int kMapPairs = kMapSide / 2;  // of image rows

struct MapPlanes {
    unsigned char bytes[kBlockChannels * kMapPlaneBytes];

    __device__ __forceinline__ unsigned char* of(int channel) {
        return bytes + plane_of(channel) * kMapPlaneBytes;
    }
};

// What a thread fills and drains: a row of an image in half of the block's channels. The row is
// the warp's number.
struct MapRole {
    int half, image, row;

    __device__ __forceinline__ explicit MapRole(int thread)
        : half(thread & 1), image(thread >> 1 & 15), row(thread >> 5) {}

    // Its pixels of channel 8·half + i.
    __device__ __forceinline__ int cell(int i) const {
        return (2 * i + half) * kMapPlaneBytes + row * kMapRowBytes + image * 16;
    }
};
static_assert(kThreads == kMapImages * kMapSide * 2);

// Banded weights: a row (channel, ky) holds w[ky, e] at element e + 7 − R, zeros around; two copies
// of 8 words, the second shifted by one more element, keep a fragment register, the pair
// (w[e], w[e + 1]), a single 4-byte load. Four words of padding spread the fill over the banks.
template <int K>
struct MapBands {
    static constexpr int kRowWords = 20;
    std::uint32_t words[kBlockChannels * K * kRowWords];

    // weight: [C, K·K] of the block's first channel, `channels` of which exist. `flipped`: of the
    // transposed convolution, which gives the gradient of the input.
    template <class Element>
    __device__ __forceinline__ void fill(const float* weight, int channels, bool flipped,
                                         int thread) {
        static_assert(kBlockChannels * K <= kThreads);
        constexpr int kLead = kMapSide - 1 - K / 2;
        if (thread >= kBlockChannels * K) return;
        const int channel = thread / K, ky = thread - channel * K;
        float w[K];
#pragma unroll
        for (int kx = 0; kx < K; ++kx) {
            const int tap = flipped ? (K - 1 - ky) * K + (K - 1 - kx) : ky * K + kx;
            w[kx] = channel < channels ? load_global(weight + channel * K * K + tap) : 0.f;
        }
        const auto at = [&](int i) { return i >= kLead && i < kLead + K ? w[i - kLead] : 0.f; };
#pragma unroll
        for (int copy = 0; copy < 2; ++copy) {
#pragma unroll
            for (int i = 0; i < 8; i += 4) {
                const auto word = [&](int k) {
                    return Element::pack(at(2 * (i + k) - copy), at(2 * (i + k) + 1 - copy));
                };
                store_shared(words + thread * kRowWords + copy * 8 + i,
                             make_uint4(word(0), word(1), word(2), word(3)));
            }
        }
    }

    // This lane's word of the channel's band T_0; T_ky is kRowWords · ky further.
    __device__ __forceinline__ const std::uint32_t* of(int channel, int lane) const {
        const int g = lane >> 2, t = lane & 3, i = 2 * t - g + kMapSide - 1;
        return words + channel * K * kRowWords + (i & 1 ? 8 + (i + 1) / 2 : i / 2);
    }
};

// Convolves one channel of the tile in place. kSide: rows of the map, those behind it being zero.
template <class Element, int K, int kSide>
__device__ __forceinline__ void convolve_map(unsigned char* plane, const std::uint32_t* bands,
                                             float start, int lane) {
    constexpr int R = K / 2, kBands = (K + 1) / 2;
    FragmentA window[kMapPairs];
#pragma unroll
    for (int p = 0; p < kMapPairs; ++p) {
        load_matrices<false>(window[p], plane + p * 2 * kMapRowBytes + lane * 16);
    }
    __syncwarp();  // all lanes have read the rows that are written now
    // Output rows of one parity meet the bands in pairs (T_0, T_1) …, those of the other in pairs
    // (0, T_0), (T_1, T_2) ….
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
        FragmentB band[kBands];
#pragma unroll
        for (int i = 0; i < kBands; ++i) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int ky = 2 * i - odd + j;
                band[i][j] = ky >= 0 && ky < K
                                 ? load_shared<std::uint32_t>(bands + ky * MapBands<K>::kRowWords)
                                 : 0u;
            }
        }
#pragma unroll
        for (int y = (R + odd) % 2; y < kSide; y += 2) {
            FragmentC sum = {start, start, start, start};
#pragma unroll
            for (int p = 0; p < kMapPairs; ++p) {
                const int k0 = 2 * p - y + R;
                if (k0 >= -1 && k0 < K) mma<Element>(sum, window[p], band[(k0 + odd) / 2], sum);
            }
            unsigned char* row = plane + y * kMapRowBytes + lane * 4;
            store_shared(row, Element::pack(sum[0], sum[1]));
            store_shared(row + kMapRowBytes / 2, Element::pack(sum[2], sum[3]));
        }
    }
}

// A row of the image in the registers of its thread.
template <int kSide>
using MapRow = Octet[kSide];

// Where the row's first pixel is, if it exists.
struct MapPlace {
    std::uint32_t pixel;
    bool exists;

    // `channels`: of this thread's, that exist.
    __device__ __forceinline__ MapPlace(const MapRole& role, int tile, int images, int height,
                                        int width, int channels) {
        const int image = tile * kMapImages + role.image;
        pixel = static_cast<std::uint32_t>(image * height + role.row) * width;
        exists = image < images && role.row < height && channels > 0;
    }
};

// Zeros where there is no pixel. `tensor`: of this thread's first channel.
template <int kSide>
__device__ __forceinline__ void load_map_row(MapRow<kSide>& row, const std::uint16_t* tensor,
                                             const MapPlace& place, int width, int C) {
    const std::uint16_t* first = at_pixel(tensor, place.pixel, 2 * static_cast<std::uint32_t>(C));
#pragma unroll
    for (int x = 0; x < kSide; ++x) {
        row[x] = Octet{};
        if (place.exists && x < width) row[x] = load_octet<true>(first + x * C, 8);
    }
}

template <int kSide>
__device__ __forceinline__ void store_map_row(const MapRow<kSide>& row, std::uint16_t* tensor,
                                              const MapPlace& place, int width, int C) {
    if (!place.exists) return;
    std::uint16_t* first = at_pixel(tensor, place.pixel, 2 * static_cast<std::uint32_t>(C));
#pragma unroll
    for (int x = 0; x < kSide; ++x) {
        if (x < width) store_octet<true>(first + x * C, row[x], 8);
    }
}

// From NHWC registers to planes and back, by byte permutations.
template <int kSide>
__device__ __forceinline__ void row_to_planes(const MapRow<kSide>& row, const MapRole& role,
                                              MapPlanes& planes) {
    const auto pair = [&](int x, int k) { return x < kSide ? row[x].pair[k] : 0u; };
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        std::uint32_t low[4], high[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            low[j] = join_low(pair(2 * j, k), pair(2 * j + 1, k));
            high[j] = join_high(pair(2 * j, k), pair(2 * j + 1, k));
        }
        store_shared(planes.bytes + role.cell(2 * k), make_uint4(low[0], low[1], low[2], low[3]));
        store_shared(planes.bytes + role.cell(2 * k + 1),
                     make_uint4(high[0], high[1], high[2], high[3]));
    }
}

// Channels 2k, 2k + 1 of the row as pairs of neighbouring pixels.
__device__ __forceinline__ void load_map_pair(std::uint32_t (&low)[4], std::uint32_t (&high)[4],
                                              int k, const MapRole& role, MapPlanes& planes) {
    const auto a = load_shared<uint4>(planes.bytes + role.cell(2 * k));
    const auto b = load_shared<uint4>(planes.bytes + role.cell(2 * k + 1));
    low[0] = a.x, low[1] = a.y, low[2] = a.z, low[3] = a.w;
    high[0] = b.x, high[1] = b.y, high[2] = b.z, high[3] = b.w;
}

template <int kSide>
__device__ __forceinline__ void planes_to_row(MapRow<kSide>& row, const MapRole& role,
                                              MapPlanes& planes) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        std::uint32_t low[4], high[4];
        load_map_pair(low, high, k, role, planes);
#pragma unroll
        for (int x = 0; x < kSide; ++x) {
            row[x].pair[k] =
                x % 2 ? join_high(low[x / 2], high[x / 2]) : join_low(low[x / 2], high[x / 2]);
        }
    }
}

// Mean and rstd of the row's pixels as ẑ = g·scale + shift; zeros where there is none.
template <int kSide>
struct MapNorm {
    float scale[kSide], shift[kSide];

    __device__ __forceinline__ MapNorm(const float* mean, const float* rstd, const MapPlace& place,
                                       int width) {
#pragma unroll
        for (int x = 0; x < kSide; ++x) {
            const bool exists = place.exists && x < width;
            scale[x] = exists ? load_global(rstd + place.pixel + x) : 0.f;
            shift[x] = exists ? -load_global(mean + place.pixel + x) * scale[x] : 0.f;
        }
    }
};

// z to the planes, zero right of the map; h becomes g.
template <class Element, int kSide>
__device__ __forceinline__ void gelu_norm_row(MapRow<kSide>& h, const MapNorm<kSide>& norm,
                                              const BlockAffine& affine, int width,
                                              const MapRole& role, MapPlanes& planes) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const auto gamma = load_shared<float2>(&affine.gamma[role.half * 8 + 2 * k]);
        const auto beta = load_shared<float2>(&affine.beta[role.half * 8 + 2 * k]);
        float z_low[kMapSide] = {}, z_high[kMapSide] = {};
#pragma unroll
        for (int x = 0; x < kSide; ++x) {
            const float g_low = gelu_fast<Element>(Element::low(h[x].pair[k]));
            const float g_high = gelu_fast<Element>(Element::high(h[x].pair[k]));
            h[x].pair[k] = Element::pack(g_low, g_high);
            if (x < width) {
                z_low[x] = fmaf(fmaf(g_low, norm.scale[x], norm.shift[x]), gamma.x, beta.x);
                z_high[x] = fmaf(fmaf(g_high, norm.scale[x], norm.shift[x]), gamma.y, beta.y);
            }
        }
        const auto words = [](const float (&z)[kMapSide]) {
            return make_uint4(Element::pack(z[0], z[1]), Element::pack(z[2], z[3]),
                              Element::pack(z[4], z[5]), Element::pack(z[6], z[7]));
        };
        store_shared(planes.bytes + role.cell(2 * k), words(z_low));
        store_shared(planes.bytes + role.cell(2 * k + 1), words(z_high));
    }
}

}  // namespace convnest::cuda
