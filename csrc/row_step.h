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

template <class A>
struct RowStep {
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
    Ring<A> take_ring(Carver& carver, bool in_turn = false) const {
        const std::int64_t most = rows + K - 1, slots = most < H ? most : H;
        const std::int64_t padded = tiles.width() + K - 1;
        const std::int64_t stride = Ring<A>::block_elements(slots, padded);
        const std::int64_t held = in_turn ? 1 : blocks;
        return {carver.take<A>(held * stride), held, slots, padded, in_turn ? 0 : stride, K / 2, W};
    }

    // The ring rows that output row y and those that rows before `end` need.
    std::int64_t first_row(std::int64_t y) const { return y > K / 2 ? y - K / 2 : 0; }
    std::int64_t end_row(std::int64_t end) const { return end + K / 2 < H ? end + K / 2 : H; }

    // One block of image row y of n, in the accumulate type. A walk with long strides, so it asks
    // for the next block.
    template <class T>
    void copy_row(const T* image, std::int64_t n, std::int64_t y, std::int64_t block,
                  std::int64_t C, A* out) const {
        const std::int64_t c = block * L;
        const T* in = image + (n * H + y) * W * C + c;
        const FirstLanes rest{static_cast<int>(C - c < L ? C - c : L)};
        for (std::int64_t x = 0; x < W; ++x) {
            const T* at = in + x * C;
            ask_for(at, L, AllLanes<1>{});
            store(out + x * L, rest.count == L ? load_from(at) : load_as(at, rest).v[0]);
        }
    }

    // pointers[i] = ring row y - p + i of a block; those in [begin, end) exist.
    struct Rows {
        const A* pointers[kLargestKernel - 1 + kSmallMap];
        std::int64_t begin, end;
    };
    void point(const Ring<A>& ring, std::int64_t block, std::int64_t y, std::int64_t count,
               Rows* rows_out) const {
        const std::int64_t top = y - K / 2;
        rows_out->begin = top < 0 ? -top : 0;
        rows_out->end = end_row(y + count) - top;
        for (std::int64_t i = rows_out->begin; i < rows_out->end; ++i) {
            rows_out->pointers[i] = ring.row(block, top + i);
        }
    }

    // All blocks of `count` rows from y on, to out + r * out_row + x * out_pixel + block *
    // out_block; enter(block) comes before each.
    template <class F>
    CONVNEST_INLINE_LAMBDA void convolve(const RowKernels<A>& kernels, const Ring<A>& ring,
                                         const A* weight, std::int64_t y, std::int64_t count,
                                         A* out, std::int64_t out_row, std::int64_t out_pixel,
                                         std::int64_t out_block, F&& enter) const {
        Rows r;
        for (std::int64_t b = 0; b < blocks; ++b) {
            enter(b);
            point(ring, b, y, count, &r);
            kernels.conv_rows({r.pointers, r.begin, r.end, weight + b * K * K * L,
                               out + b * out_block, out_row, out_pixel, count, W, tiles});
        }
    }
};

// The rows of a ring that holds a whole map, as the row kernels take them.
template <class A>
struct MapRows {
    const A* pointers[kLargestKernel - 1 + kSmallMap];
    std::int64_t begin, end;

    MapRows(const Ring<A>& ring, std::int64_t H, int K) : begin(K / 2), end(K / 2 + H) {
        for (std::int64_t i = begin; i < end; ++i) pointers[i] = ring.row(0, i - begin);
    }
};

}  // namespace
}  // namespace convnest::CONVNEST_ISA
