// How a unit of the two conv stems marches down its rows, `rows` a step, with a Ring of rows.
#pragma once

#include <cstdint>

#include "common/pack.h"
#include "common/parallel.h"
#include "common/parameters.h"
#include "common/partition.h"
#include "depthwise_row.h"

namespace convnest::CONVNEST_ISA {
namespace {

constexpr int kLargestKernel = 13;
// Two rows a step share the loads of a register tile of two rows, and keep the ring near the size
// of an L2 cache. A map of at most kWholeMap rows is one step: the weights are then read once.
constexpr std::int64_t kRowsPerStep = 2;
constexpr std::int64_t kWholeMap = 8;

// The rows of a ring's block for output rows from y on, up to image row `last_end`, as the row
// kernels take them.
template <class E>
struct RingRows {
    const E* pointers[kLargestKernel - 1 + kSmallMap];
    std::int64_t begin, end;
    bool odd;

    RingRows(const Ring<E>& ring, std::int64_t block, std::int64_t y, std::int64_t last_end)
        : odd(y % 2 != 0) {
        // Where rows are pairs the first of them starts one.
        const std::int64_t top = y - (kTapRows<E> == 1 ? 0 : odd) - ring.pad;
        const std::int64_t first = ring.index(top, ring.pad);
        begin = first < 0 ? -first : 0;
        end = ring.index(last_end - 1, ring.pad) + 1 - first;
        for (std::int64_t i = begin; i < end; ++i) pointers[i] = ring.at(block, first + i);
    }
};

// `E`: an element of the ring.
template <class E>
struct RowStep {
    using A = Accumulate<E>;
    static constexpr int L = kLanes<A>;

    std::int64_t H, W;
    int K;
    std::int64_t rows;      // output rows a step
    std::int64_t blocks;    // vectors of channels
    std::int64_t channels;  // blocks * L
    std::int64_t pixel;     // from one pixel to the next in a row buffer
    TilePlan tiles;

    static RowStep plan(std::int64_t H, std::int64_t W, std::int64_t C, int K,
                        std::int64_t whole_map = kWholeMap) {
        const std::int64_t blocks = block_count<A>(C);
        // An odd number of vectors, as in Ring.
        return {H,
                W,
                K,
                H <= whole_map ? H : kRowsPerStep,
                blocks,
                blocks * L,
                (blocks | 1) * L,
                plan_tiles(W)};
    }

    // `in_turn`: blocks have the ring one after the other, which a step that is a whole map allows.
    Ring<E> take_ring(Carver& carver, bool in_turn = false) const {
        // Of rows or pairs; an odd number of rows begins or ends within a pair.
        const std::int64_t most = (rows + K - 1 + kTapRows<E> - 1) / kTapRows<E>;
        const std::int64_t all = Ring<E>::index(H - 1, K / 2) + 1;
        const std::int64_t slots = most < all ? most : all;
        const std::int64_t padded = tiles.width() + K - 1;
        const std::int64_t stride = Ring<E>::block_elements(slots, padded);
        const std::int64_t held = in_turn ? 1 : blocks;
        return {carver.take<E>(held * stride), held, slots, padded, in_turn ? 0 : stride, K / 2, W};
    }

    // A ring of one block and the whole map.
    Ring<E> take_map(Carver& carver) const {
        const std::int64_t slots = Ring<E>::index(H - 1, K / 2) + 1;
        const std::int64_t padded = tiles.width() + K - 1;
        return {carver.take<E>(slots * padded * L), 1, slots, padded, 0, K / 2, W};
    }

    // Of what weight_rows takes of `count` rows; it is zero before they are put there.
    std::int64_t in_elements(std::int64_t count) const {
        return (count + kTapRows<E> - 1) / kTapRows<E> * tiles.width() * L;
    }
    // Where image row y is in it, of a step that starts at `first`.
    E* in_row(E* in, std::int64_t y, std::int64_t first) const {
        const std::int64_t i = y / kTapRows<E> - first / kTapRows<E>;
        return in + i * tiles.width() * L;
    }

    // Of the step that starts at row y of a band: one that is not the band's first starts a pair.
    std::int64_t count(std::int64_t y, std::int64_t band_end) const {
        const std::int64_t most = rows - (kTapRows<E> == 1 ? 0 : y % 2);
        return band_end - y < most ? band_end - y : most;
    }

    // The ring rows that output row y and those that rows before `end` need.
    std::int64_t first_row(std::int64_t y) const { return y > K / 2 ? y - K / 2 : 0; }
    std::int64_t end_row(std::int64_t end) const { return end + K / 2 < H ? end + K / 2 : H; }

    // put(x, vector) takes one block of image row y of n. A walk with long strides, so it asks for
    // the next block.
    template <class T, class F>
    void copy_row(const T* image, std::int64_t n, std::int64_t y, std::int64_t block,
                  std::int64_t C, F&& put) const {
        const std::int64_t c = block * L;
        const T* in = image + (n * H + y) * W * C + c;
        const FirstLanes rest{static_cast<int>(C - c < L ? C - c : L)};
        for (std::int64_t x = 0; x < W; ++x) {
            const T* at = in + x * C;
            ask_for(at, L, AllLanes<1>{});
            put(x, rest.count == L ? load_from(at) : load_as(at, rest).v[0]);
        }
    }

    // All blocks of `count` rows from y on, to out + r * out_row + x * out_pixel + block *
    // out_block; enter(block) comes before each.
    template <class F>
    CONVNEST_INLINE_LAMBDA void convolve(const RowKernels<E>& kernels, const Ring<E>& ring,
                                         const E* weight, std::int64_t y, std::int64_t count,
                                         A* out, std::int64_t out_row, std::int64_t out_pixel,
                                         std::int64_t out_block, F&& enter) const {
        for (std::int64_t b = 0; b < blocks; ++b) {
            enter(b);
            const RingRows<E> r(ring, b, y, end_row(y + count));
            kernels.conv_rows({r.pointers, r.begin, r.end, weight + b * tap_elements<E>(K),
                               out + b * out_block, out_row, out_pixel, count, W, tiles, r.odd});
        }
    }
};

}  // namespace
}  // namespace convnest::CONVNEST_ISA
