// Depthwise K x K convolution of a few image rows, one vector of channels at a time, and its
// weight gradient. Shared by nested_conv and dwconv_gelu_layernorm, forward and backward.
//
//   conv_rows      out[y,x]    = sum_{ky,kx} w[ky,kx] in[y+ky-p, x+kx-p],           p = K / 2
//   weight_rows    dw[ky,kx]  += sum_{y,x} dy[y+p-ky, x+p-kx] in[y,x]
//
// The rows of one operand come from a Ring: zero-padded by p columns on both sides, channel-blocked
// so that all rows that one vector of channels needs are one short stretch of memory. The input
// gradient of a convolution is conv_rows with the weights flipped.
//
// Where the instruction set multiplies pairs of bfloat16 and adds them in float, a ring of bfloat16
// holds two rows in an element, and a product is of two taps. A pair starts at a row that is p
// modulo 2: the rows that an even output row and the one below it need are then whole pairs.
//
//   out[y]      = w[0,1] in[y-p,y-p+1] + ... + w[K-1,none] in[y+p,y+p+1],           y even
//   out[y + 1]  = w[none,0] in[y-p,y-p+1] + ... + w[K-2,K-1] in[y+p,y+p+1],         none = 0
//
// Weights are rounded to bfloat16, as those of linear layers are. An input that is not finite
// reaches the row beside the kernel's, too.
#pragma once

#include <cstdint>

#include "common/pack.h"
#include "common/parameters.h"

namespace convnest::CONVNEST_ISA {

// Output columns are done in register tiles of 7 (the maps of 224-pixel images are multiples of 7)
// and of 4; what they overshoot is computed from padding and not stored.
constexpr int kLargeTile = 7;
constexpr int kSmallTile = 4;

struct TilePlan {
    std::int64_t large;
    std::int64_t small;
    std::int64_t width() const { return kLargeTile * large + kSmallTile * small; }
};

// An element of a ring: the accumulate type, or a pair of rows of bfloat16, the upper one in the
// low half.
using RowPair = std::uint32_t;
template <class T>
struct TapOf {
    using type = Accumulate<T>;
};
#if defined(__AVX512BF16__)
template <>
struct TapOf<BFloat16> {
    using type = RowPair;
};
#endif

// conv_rows and weight_rows for one kernel size; `L` lanes to a vector.
//   rows[i]   input row y0 - p + i, at its first padding column; i in [begin, end) is in the image
// Where rows are pairs, rows[0] is the one that has row y0 - p.
template <class E>
struct ConvRows {
    const E* const* rows;
    std::int64_t begin, end;
    const E* weight;     // as WeightCopy leaves it
    Accumulate<E>* out;  // out + y * out_row + x * out_pixel
    std::int64_t out_row, out_pixel;
    std::int64_t count;  // output rows y0 ... y0 + count - 1
    std::int64_t width;
    TilePlan plan;
    bool odd = false;  // y0; only where rows are pairs
};

template <class E>
struct WeightRows {
    const E* const* rows;  // of dy
    std::int64_t begin, end;
    const E* in;  // [count][plan.width()][L], zero from `width` on; a pair starts at an even row
    Accumulate<E>* dweight_flip;  // [K * K][L]: entry K*K-1-(ky*K+kx) gains dw[ky,kx]
    std::int64_t count;
    std::int64_t width;
    TilePlan plan;
    bool odd = false;
};

template <class E>
struct RowKernels {
    void (*conv_rows)(const ConvRows<E>&);
    void (*weight_rows)(const WeightRows<E>&);
};

// K is 3, 5, 7, 9, 11 or 13; the caller has checked it.
void row_kernels(int K, RowKernels<float>* kernels);
void row_kernels(int K, RowKernels<double>* kernels);
#if defined(__AVX512BF16__)
void row_kernels(int K, RowKernels<RowPair>* kernels);
#endif

namespace {

// Rows of an element.
template <class E>
constexpr int kTapRows = 1;
template <>
constexpr int kTapRows<RowPair> = 2;

inline TilePlan plan_tiles(std::int64_t width) {
    TilePlan best{(width + kLargeTile - 1) / kLargeTile, 0};
    // A small tile costs a little more per column: it loads K - 1 halo columns for fewer outputs.
    const auto cost = [](TilePlan plan) { return 70 * plan.large + 44 * plan.small; };
    for (std::int64_t small = 1; small < kLargeTile; ++small) {
        const std::int64_t rest = width - kSmallTile * small;
        const TilePlan plan{rest > 0 ? (rest + kLargeTile - 1) / kLargeTile : 0, small};
        if (cost(plan) < cost(best)) best = plan;
    }
    return best;
}

// Where a row is in the elements: of a pair the upper row, which comes first, clears the other
// half, and the lower one joins it, unless no row came before it.
template <class E>
struct Place {
    using A = Accumulate<E>;
    bool second, joins;

    // Where pairs start at even rows.
    static Place of_row(std::int64_t y, std::int64_t first) {
        return {y % 2 != 0, y % 2 != 0 && y > first};
    }
    CONVNEST_INLINE_LAMBDA void put(E* at, Vec<A> value) const {
        if constexpr (kTapRows<E> == 1) {
            store(at, value);
        } else {
            const Words bits = widen_bits(narrow_normal(value, BFloat16{}));
            store(at, (load(at) & (joins ? 0xffffu : 0u)) | bits << (second ? 16u : 0u));
        }
    }
    template <int N>
    CONVNEST_INLINE_LAMBDA void put_all(E* at, const Pack<A, N>& pack, std::int64_t stride) const {
        unroll<N>([&](auto i) CONVNEST_INLINE_LAMBDA { put(at + i * stride, pack.v[i]); });
    }
    CONVNEST_INLINE_LAMBDA Vec<A> get(const E* at) const {
        if constexpr (kTapRows<E> == 1) {
            return load(at);
        } else {
            return (Vec<A>)((load(at) >> (second ? 16u : 0u)) << 16);
        }
    }
};

// The elements that the weights of one vector of channels take.
template <class E>
CONVNEST_INLINE std::int64_t tap_elements(int K) {
    return (kTapRows<E> == 1 ? K : K + 1) * K * kLanes<E>;
}

// [C, K * K] to [block][K * K][L], flipped for an input gradient; or to [block][2][(K + 1) / 2][K]
// [L] pairs, of the even output rows and of the odd ones.
template <class E>
struct WeightCopy {
    using A = Accumulate<E>;
    static constexpr int L = kLanes<E>;
    const A* weight;
    E* blocked;
    std::int64_t C;
    int K;
    bool flip;

    static void run_block(std::int64_t block, char*, void* context) {
        static_cast<const WeightCopy*>(context)->copy(block);
    }
    void copy(std::int64_t block) const {
        const int taps = K * K;
        E* out = blocked + block * tap_elements<E>(K);
        for (int tap = 0; tap < taps; ++tap) {
            Vec<A> values = {};
            for (std::int64_t lane = 0; lane < L && block * L + lane < C; ++lane) {
                const A* in = weight + (block * L + lane) * taps;
                values[lane] = in[flip ? taps - 1 - tap : tap];
            }
            if constexpr (kTapRows<E> == 1) {
                store(out + tap * L, values);
            } else {
                const int ky = tap / K, kx = tap % K;
                for (const int odd : {0, 1}) {
                    E* at = out + ((odd * (K + 1) + ky + odd) / 2 * K + kx) * L;
                    Place<E>::of_row(ky + odd, odd).put(at, values);
                }
            }
        }
    }
    Units units() { return {block_count<A>(C), 0, nullptr, run_block, this}; }
};

// Image rows: row y of channel vector b is in row(b, y), with p columns of zeros before it and at
// least p after it. Rows, or pairs, `slots` apart share memory.
template <class E>
struct Ring {
    using A = Accumulate<E>;
    E* data;
    std::int64_t blocks, slots, padded, block_stride;
    int pad;
    std::int64_t width;

    static std::int64_t block_elements(std::int64_t slots, std::int64_t padded) {
        // An odd number of vectors: the same pixel in all blocks spreads over all cache sets.
        return (slots * padded | 1) * kLanes<E>;
    }
    // Of row y among all rows, or pairs; the first one of a pair may be a negative y, too.
    static std::int64_t index(std::int64_t y, int pad) {
        return kTapRows<E> == 1 ? y : (y + pad % 2) / 2;
    }
    E* at(std::int64_t block, std::int64_t i) const {
        return data + block * block_stride + (i % slots) * padded * kLanes<E>;
    }
    E* row(std::int64_t block, std::int64_t y) const { return at(block, index(y, pad)); }
    // All else is written before it is read.
    void clear_padding() const {
        const std::int64_t first = (pad + width) * kLanes<E>;
        for (std::int64_t b = 0; b < blocks; ++b) {
            for (std::int64_t i = 0; i < slots; ++i) {
                E* row = at(b, i);
                for (std::int64_t j = 0; j < pad * kLanes<E>; ++j) row[j] = 0;
                for (std::int64_t j = first; j < padded * kLanes<E>; ++j) row[j] = 0;
            }
        }
    }

    // Of row y in its elements; rows enter in order, from `first` on.
    Place<E> place(std::int64_t y, std::int64_t first) const {
        return Place<E>::of_row(y + pad, first + pad);
    }
};

}  // namespace
}  // namespace convnest::CONVNEST_ISA
