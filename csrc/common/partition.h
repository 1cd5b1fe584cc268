// How the CPU kernels cut their work: pure functions of the shape and the thread count.
#pragma once

#include <cstdint>

namespace convnest {

// At most this many partial sums of a parameter gradient, and at most this much memory for them.
constexpr std::int64_t kMaxChunks = 32;
constexpr std::int64_t kMaxPartialBytes = std::int64_t{32} << 20;

// A range [begin, end) of `total`, the i-th of `parts` nearly equal ones.
struct Range {
    std::int64_t begin, end;
};
static inline Range part_of(std::int64_t total, std::int64_t parts, std::int64_t i) {
    // total / parts first: total * i could overflow.
    const std::int64_t each = total / parts, rest = total % parts;
    const std::int64_t begin = each * i + (i < rest ? i : rest);
    return {begin, begin + each + (i < rest ? 1 : 0)};
}

// Bands of rows per image for a forward pass, whose results do not depend on it: the fewest that
// finish first, when every band costs its rows and a part of its halo once more.
static inline std::int64_t forward_bands(std::int64_t N, std::int64_t H, int K, int threads) {
    const std::int64_t halo = (K - 1 + 1) / 3;  // a halo row is about a third of a row's work
    std::int64_t best = 1, best_cost = -1;
    for (std::int64_t bands = 1; bands <= H && bands <= 4 * threads; ++bands) {
        const std::int64_t rounds = (N * bands + threads - 1) / threads;
        const std::int64_t cost = rounds * ((H + bands - 1) / bands + (bands > 1 ? halo : 0));
        if (best_cost < 0 || cost < best_cost) {
            best = bands;
            best_cost = cost;
        }
    }
    return best;
}

// Whether neighbouring bands of nested_block share the first layer and GELU of the K - 1 rows about
// their edge: where they are long enough that the rows of two edges do not meet.
static inline bool share_edges(std::int64_t H, std::int64_t bands, int K) {
    return bands > 1 && H / bands >= K - 1;
}

// Bands per image for a backward pass: of the shape only, so that the order of every sum is too.
// A band has 2 K rows or more, since K - 1 halo rows are computed again.
static inline std::int64_t backward_bands(std::int64_t N, std::int64_t H, int K) {
    const std::int64_t wanted = (kMaxChunks + N - 1) / N, most = H / (2 * K);
    const std::int64_t bands = wanted < most ? wanted : most;
    return bands > 1 ? bands : 1;
}

// nested_block on small maps (nested_block_slices.h): whether threads share the channels and a few
// images pass together. Of the shape only, since the order of some sums goes with it. From 7 slices
// on; below, the weights of both layers fit an L2 cache beside the rows, and images are units
// enough.
constexpr std::int64_t kSmallMap = 16;
constexpr std::int64_t kSliceChannels = 144;
static inline bool in_slices(std::int64_t H, std::int64_t W, std::int64_t D) {
    return H <= kSmallMap && W <= kSmallMap && D > 6 * kSliceChannels;
}

// Images that pass together: about kGroupPixels, over which the weights and the sums of their
// gradients are read once, while the wide features stay in cache.
constexpr std::int64_t kGroupPixels = 256;
static inline std::int64_t images_of_group(std::int64_t N, std::int64_t H, std::int64_t W) {
    const std::int64_t most = kGroupPixels / (H * W);
    return most < 1 ? 1 : most < N ? most : N;
}

// Rows below which a part of a layer is not worth a thread.
constexpr std::int64_t kLeastRows = 32;

// Units of rows of C channels: enough to go round many threads, none smaller than is worth the
// hand-over (about 10 us). Of the shape only.
static inline std::int64_t row_units(std::int64_t rows, std::int64_t C) {
    constexpr std::int64_t kSmallest = 1 << 15;  // elements
    const std::int64_t most = rows < 64 ? rows : 64;
    const std::int64_t units = rows / (1 + (kSmallest - 1) / C);
    return units < 1 ? 1 : units < most ? units : most;
}

// Parameter gradients are summed over so many rows before they join a partial, which may see 10^5:
// float32 sums of sums lose less.
constexpr std::int64_t kRowsPerSum = 64;

// Each chunk walks its units in order into its own partial; the partials are summed in order.
static inline std::int64_t chunk_count(std::int64_t units, std::int64_t partial_bytes) {
    std::int64_t chunks = kMaxPartialBytes / (partial_bytes > 0 ? partial_bytes : 1);
    if (chunks > kMaxChunks) chunks = kMaxChunks;
    if (chunks > units) chunks = units;
    return chunks > 1 ? chunks : 1;
}

}  // namespace convnest
