// How the pixels of a batch lie under the blocks of the convolutions on the FMA units.
//
// A lane is one of 32 neighbouring channels, a warp a strip of 7 neighbouring outputs (ConvNeSt's
// maps are 56, 28, 14 and 7 wide), a block a row of strips: of several narrow images side by side,
// or of one column of a wide image. A row of shared memory holds R zeros or halo pixels, then for
// each image its strips and R pixels that serve this image and the next:
//
//     position    0 … R−1 | 7·per_image of image 0 | R | 7·per_image of image 1 | R | …
//
// An item of work is such a block's width times a part of its rows. No rows stand between images:
// what a gap would add is zero, and is left out.
#pragma once

#include "common/gelu.cuh"
#include "common/memory.cuh"
#include "common/plan.cuh"

namespace convnest::cuda {

constexpr int kFmaChannels = kWarpSize;
constexpr int kStrip = 7;  // outputs of a thread

struct FmaTiles {
    int images, height, width;
    int per_image;  // strips of an image in a block
    int beside;     // images in a block; 1 with columns
    int columns;    // of blocks, for an image wider than a block
    int parts;      // of an image's rows
    int part_rows;
    int items;

    int strips() const { return per_image * beside; }
};

// `most_strips`: to a block. Pure, and a function of the shape only.
inline FmaTiles plan_fma_tiles(int images, int height, int width, int most_strips,
                               int wanted_items) {
    // Below this many rows the halo is most of what a part of an image reads.
    constexpr int kFewestRows = 16;
    FmaTiles t{};
    t.images = images, t.height = height, t.width = width;
    const int row_strips = ceil_div(width, kStrip);
    t.columns = ceil_div(row_strips, most_strips);
    t.per_image = ceil_div(row_strips, t.columns);
    t.beside = t.columns > 1 ? 1 : most_strips / t.per_image;
    if (t.beside > images) t.beside = images;
    const int blocks = ceil_div(images, t.beside) * t.columns;
    const int most_parts = height / kFewestRows > 1 ? height / kFewestRows : 1;
    const int wanted_parts = ceil_div(wanted_items, blocks);
    t.part_rows = ceil_div(height, wanted_parts < most_parts ? wanted_parts : most_parts);
    t.parts = ceil_div(height, t.part_rows);
    t.items = blocks * t.parts;
    return t;
}

struct FmaItem {
    int image;       // the leftmost
    int x;           // of the first strip
    int first, end;  // rows

    __device__ __forceinline__ FmaItem(const FmaTiles& t, int index) {
        const int part = index % t.parts, block = index / t.parts;
        image = block / t.columns * t.beside;
        x = block % t.columns * t.per_image * kStrip;
        first = part * t.part_rows;
        end = first + t.part_rows < t.height ? first + t.part_rows : t.height;
    }
};

// Which pixel a position of the row is: twice its offset from row 0 of the item's first image, plus
// 1 if it is an output of the item's; or no pixel.
constexpr std::uint32_t kNothing = 0xffffffffu;

__device__ __forceinline__ std::uint32_t fma_source(const FmaTiles& t, const FmaItem& item,
                                                    int position, int radius) {
    const int outputs = t.per_image * kStrip, pitch = outputs + radius, at = position - radius;
    int image = at < 0 ? 0 : at / pitch;
    if (image >= t.beside) image = t.beside - 1;
    const int x = at - image * pitch, pixel_x = item.x + x;
    if (pixel_x < 0 || pixel_x >= t.width || item.image + image >= t.images) return kNothing;
    const auto offset = static_cast<std::uint32_t>(image * t.height * t.width + pixel_x);
    return offset << 1 | (x >= 0 && x < outputs ? 1u : 0u);
}

// A row's mean and rstd for each position, on their way with it.
template <int kRows, int kPositions>
struct FmaStatistics {
    float mean[kRows][kPositions];
    float rstd[kRows][kPositions];

    __device__ __forceinline__ void fetch(int row, int position, const float* from_mean,
                                          const float* from_rstd) {
        async_copy_float(&mean[row][position], from_mean, true);
        async_copy_float(&rstd[row][position], from_rstd, true);
    }
};

// 16 bytes of neighbouring channels as floats.
template <class Element>
struct Channels {
    using Storage = typename Element::Storage;
    static constexpr int kCount = 16 / sizeof(Storage);
    float value[kCount];

    __device__ __forceinline__ void unpack(const uint4& v) {
        const std::uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (kCount == 4) {
                value[i] = bits_to_float(words[i]);
            } else {
                value[2 * i] = Element::low(words[i]);
                value[2 * i + 1] = Element::high(words[i]);
            }
        }
    }

    // The bits of 16 bytes that have arrived in `landed` (FmaLanding); without vectors what stands
    // at `address`, the channels past `channels` being zero.
    __device__ __forceinline__ void take(const float* landed, const Storage* address, int channels,
                                         bool vector) {
        if (vector) return unpack(load_shared<uint4>(landed));
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            value[i] = i < channels ? Element::widen_one(load_global(address + i)) : 0.f;
        }
    }

    __device__ __forceinline__ void store(Storage* address, int channels, bool vector) const {
        if (vector) {
            if constexpr (kCount == 4) {
                store_global(reinterpret_cast<float4*>(address),
                             make_float4(value[0], value[1], value[2], value[3]));
            } else {
                store_global(
                    reinterpret_cast<uint4*>(address),
                    make_uint4(Element::pack(value[0], value[1]), Element::pack(value[2], value[3]),
                               Element::pack(value[4], value[5]),
                               Element::pack(value[6], value[7])));
            }
        } else {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                if (i < channels) store_global(address + i, Element::round_one(value[i]));
            }
        }
    }

    __device__ __forceinline__ void store_shared_row(float* row) const {
#pragma unroll
        for (int i = 0; i < kCount; i += 4) {
            store_shared(row + i, make_float4(value[i], value[i + 1], value[i + 2], value[i + 3]));
        }
    }
};

// The norm of a pixel, z = (GELU(h) − mean)·rstd·γ + β, in place; `g` keeps GELU(h).
struct FmaAffine {
    float gamma[kFmaChannels];
    float beta[kFmaChannels];

    __device__ __forceinline__ void fill(const float* ln_weight, const float* ln_bias, int channel0,
                                         int C, int thread) {
        if (thread >= kFmaChannels) return;
        const int channel = channel0 + thread;
        const auto value = [&](const float* parameter, float otherwise) {
            return parameter != nullptr && channel < C ? load_global(parameter + channel)
                                                       : otherwise;
        };
        store_shared(&gamma[thread], value(ln_weight, 1.f));
        store_shared(&beta[thread], value(ln_bias, 0.f));
    }

    template <class Element>
    __device__ __forceinline__ void gelu_norm(Channels<Element>& z, Channels<Element>& g,
                                              float mean, float rstd, int channel) const {
#pragma unroll
        for (int i = 0; i < Channels<Element>::kCount; ++i) {
            g.value[i] = gelu_of<Element>(z.value[i]);
            z.value[i] = fmaf((g.value[i] - mean) * rstd, load_shared<float>(&gamma[channel + i]),
                              load_shared<float>(&beta[channel + i]));
        }
    }
};

}  // namespace convnest::cuda
