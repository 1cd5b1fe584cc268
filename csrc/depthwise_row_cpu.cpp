// The formulas and the layout are in depthwise_row.h. One call does one vector of channels.
//
// conv_rows: a register tile is R output rows x T columns. Each kernel row is K weight vectors held
// in registers, slid over T + K - 1 input vectors that are loaded once. With 32 registers R = 2, so
// that 14 sums in flight hide the latency of the multiply-add and an input row serves two outputs.
// weight_rows: G kernel rows x K sums stay in registers over all pixels of all rows; a tile of T
// input vectors meets T + K - 1 vectors of each of G rows of dy.
// Pairs of rows go the same way through both; a pair serves both rows of outputs, each with its own
// weights.
// Columns of padding that a tile can know of at compile time are skipped (First, Last).
#include "depthwise_row.h"

namespace convnest::CONVNEST_ISA {
namespace {

constexpr bool kManyRegisters = kVectorBytes == 64;

template <int T, int First, int Last>
struct Tile {
    static constexpr int kColumns = T;
    static constexpr int kFirst = First;
    static constexpr int kLast = Last;
};

// f(tile, x) for every tile of a row. The first tile starts at the image's left edge, and the last
// may end at its right edge: p of its T + K - 1 input columns are padding there. Kernels above 7
// and float64 do without that: it would triple their code for maps that are rarely so small.
template <class E, int K, class F>
CONVNEST_INLINE void over_tiles(std::int64_t width, TilePlan plan, F&& f) {
    constexpr int p = K / 2;
    constexpr bool kSkip = sizeof(E) == 4 && K <= 7;
    constexpr int kLeft = kSkip ? p : 0;
    constexpr int kBig = kLargeTile + K - 1;
    constexpr int kSmall = kSmallTile + K - 1;
    const bool exact = kSkip && plan.width() == width;
    std::int64_t x = 0;
    for (std::int64_t i = 0; i < plan.large; ++i, x += kLargeTile) {
        const bool right = exact && x + kLargeTile == width;
        if (x == 0 && right) {
            f(Tile<kLargeTile, kLeft, kBig - kLeft>{}, x);
        } else if (x == 0) {
            f(Tile<kLargeTile, kLeft, kBig>{}, x);
        } else if (right) {
            f(Tile<kLargeTile, 0, kBig - kLeft>{}, x);
        } else {
            f(Tile<kLargeTile, 0, kBig>{}, x);
        }
    }
    for (std::int64_t i = 0; i < plan.small; ++i, x += kSmallTile) {
        if (x == 0) {
            f(Tile<kSmallTile, kLeft, kSmall>{}, x);
        } else {
            f(Tile<kSmallTile, 0, kSmall>{}, x);
        }
    }
}

template <class V>
CONVNEST_INLINE V multiply_add(V sum, V a, V b) {
    return sum + a * b;
}
#if defined(__AVX512BF16__)
CONVNEST_INLINE Floats multiply_add(Floats sum, Words a, Words b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
}
#endif

// One input row (or pair) into the sums of one or two output rows. The second one's weights lie
// `to_second` elements from the first one's.
template <class E, int K, class T, int R, bool kFirstRow, bool kSecondRow>
CONVNEST_INLINE void add_input_row(const E* in, const E* weight, std::int64_t to_second,
                                   Vec<Accumulate<E>> (&sum)[R][T::kColumns]) {
    constexpr int L = kLanes<E>;
    Vec<E> first[K], second[K];
    unroll<K>([&](auto kx) CONVNEST_INLINE_LAMBDA {
        if constexpr (kFirstRow) first[kx] = load(weight + kx * L);
        if constexpr (kSecondRow) second[kx] = load(weight + to_second + kx * L);
    });
    unroll<T::kLast - T::kFirst>([&](auto step) CONVNEST_INLINE_LAMBDA {
        constexpr int j = decltype(step)::value + T::kFirst;
        const Vec<E> value = load(in + j * L);
        unroll<K>([&](auto kx) CONVNEST_INLINE_LAMBDA {
            constexpr int t = j - decltype(kx)::value;
            if constexpr (t >= 0 && t < T::kColumns) {
                if constexpr (kFirstRow) sum[0][t] = multiply_add(sum[0][t], value, first[kx]);
                if constexpr (kSecondRow)
                    sum[R - 1][t] = multiply_add(sum[R - 1][t], value, second[kx]);
            }
        });
    });
}

template <class E, int K, int R>
CONVNEST_INLINE void conv_row_group(const ConvRows<E>& c, std::int64_t y) {
    constexpr bool kPairs = kTapRows<E> == 2;
    constexpr int L = kLanes<E>, kInputs = kPairs ? (K + 1) / 2 : K + R - 1;
    const std::int64_t top = kPairs ? (y + c.odd) / 2 : y;
    const E* const* rows = c.rows + top;
    const std::int64_t begin = c.begin > top ? c.begin - top : 0;
    const std::int64_t end = c.end - top < kInputs ? c.end - top : kInputs;
    over_tiles<E, K>(c.width, c.plan, [&](auto tile, std::int64_t x) CONVNEST_INLINE_LAMBDA {
        using T = decltype(tile);
        Vec<Accumulate<E>> sum[R][T::kColumns] = {};
        const auto add = [&](auto of_first, auto of_second, const E* weight, std::int64_t to_second,
                             std::int64_t i) CONVNEST_INLINE_LAMBDA {
            add_input_row<E, K, T, R, of_first != 0, of_second != 0>(
                rows[i] + x * L, weight + i * K * L, to_second, sum);
        };
        constexpr Constant<1> yes{};
        constexpr Constant<0> no{};
        std::int64_t i = begin;
        if constexpr (kPairs) {
            const std::int64_t half = tap_elements<E>(K) / 2;
            const E* weight = c.weight + (R == 1 && (y + c.odd) % 2 != 0 ? half : 0);
            for (; i < end; ++i) add(yes, Constant<R == 2>{}, weight, half, i);
        } else if constexpr (R == 1) {
            for (; i < end; ++i) add(yes, no, c.weight, 0, i);
        } else {
            // For the first output row it is kernel row i, for the second one i - 1.
            constexpr std::int64_t kBefore = -K * L;
            if (i == 0 && i < end) add(yes, no, c.weight, kBefore, i++);
            for (; i < (end < K ? end : K); ++i) add(yes, yes, c.weight, kBefore, i);
            if (i < end) add(no, yes, c.weight, kBefore, i);
        }
        const std::int64_t columns = c.width - x < T::kColumns ? c.width - x : T::kColumns;
        unroll<R>([&](auto r) CONVNEST_INLINE_LAMBDA {
            auto* out = c.out + (y + r) * c.out_row + x * c.out_pixel;
            unroll<T::kColumns>([&](auto t) CONVNEST_INLINE_LAMBDA {
                if (t < columns) store(out + t * c.out_pixel, sum[r][t]);
            });
        });
    });
}

template <class E, int K>
void conv_rows(const ConvRows<E>& c) {
    for (std::int64_t y = 0; y < c.count;) {
        // Two rows of pairs start with an even one.
        const bool two = kTapRows<E> == 1 || (y + c.odd) % 2 == 0;
        if constexpr (kManyRegisters && sizeof(E) == 4) {
            if (two && y + 2 <= c.count) {
                conv_row_group<E, K, 2>(c, y);
                y += 2;
                continue;
            }
        }
        conv_row_group<E, K, 1>(c, y++);
    }
}

// sum[kx] += values[t] dy(t + kx): a tile of a row of `in` and the row of dy that it meets.
template <int K, class T, class V, class F, class Sum>
CONVNEST_INLINE void add_products(const V (&values)[T::kColumns], F&& dy, Sum (&sum)[K]) {
    unroll<T::kLast - T::kFirst>([&](auto step) CONVNEST_INLINE_LAMBDA {
        constexpr int j = decltype(step)::value + T::kFirst;
        const V slope = dy(j);
        unroll<K>([&](auto kx) CONVNEST_INLINE_LAMBDA {
            constexpr int t = j - decltype(kx)::value;
            if constexpr (t >= 0 && t < T::kColumns) {
                sum[kx] = multiply_add(sum[kx], values[t], slope);
            }
        });
    });
}

// To the gradients of kernel rows ky, ky + step, ...
template <class A, int K, int G>
CONVNEST_INLINE void add_sums(A* dweight_flip, int ky, int step, const Vec<A> (&sum)[G][K]) {
    unroll<G>([&](auto g) CONVNEST_INLINE_LAMBDA {
        unroll<K>([&](auto kx) CONVNEST_INLINE_LAMBDA {
            A* dw = dweight_flip + ((ky + g * step) * K + kx) * kLanes<A>;
            store(dw, load(dw) + sum[g][kx]);
        });
    });
}

// Kernel rows ky ... ky + G - 1, counted from the far end: row y of `in` meets row y + ky of dy.
template <class A, int K, int G>
CONVNEST_INLINE void weight_row_group(const WeightRows<A>& w, int ky) {
    constexpr int L = kLanes<A>;
    Vec<A> sum[G][K] = {};
    for (std::int64_t y = 0; y < w.count; ++y) {
        const A* in = w.in + y * w.plan.width() * L;
        over_tiles<A, K>(w.width, w.plan, [&](auto tile, std::int64_t x) CONVNEST_INLINE_LAMBDA {
            using T = decltype(tile);
            Vec<A> values[T::kColumns];
            unroll<T::kColumns>([&](auto t)
                                    CONVNEST_INLINE_LAMBDA { values[t] = load(in + (x + t) * L); });
            unroll<G>([&](auto g) CONVNEST_INLINE_LAMBDA {
                const std::int64_t i = y + ky + g;
                if (i < w.begin || i >= w.end) return;
                const A* dy = w.rows[i] + x * L;
                add_products<K, T>(
                    values, [&](int j) CONVNEST_INLINE_LAMBDA { return load(dy + j * L); }, sum[g]);
            });
        });
    }
    add_sums<A, K, G>(w.dweight_flip, ky, 1, sum);
}

// Kernel rows at once that leave room for a tile and a moving vector in the registers.
template <int K>
constexpr int kernel_rows_at_once() {
    constexpr int kRegisters = kManyRegisters ? 32 : 16;
    constexpr int kFit = (kRegisters - kLargeTile - 1) / K;
    return kFit < 1 ? 1 : (kFit > 3 ? 3 : kFit);
}

// f(G, first) for `count` kernel rows, G at a time.
template <int kCount, int G, class F>
CONVNEST_INLINE void over_kernel_rows(F&& f) {
    int first = 0;
    for (; first + G <= kCount; first += G) f(Constant<G>{}, first);
    if constexpr (kCount % G == 1) f(Constant<1>{}, first);
    if constexpr (kCount % G == 2) f(Constant<2>{}, first);
}

template <class A, int K>
void weight_rows(const WeightRows<A>& w) {
    over_kernel_rows<K, kernel_rows_at_once<K>()>([&](auto G, int ky) CONVNEST_INLINE_LAMBDA {
        weight_row_group<A, K, decltype(G)::value>(w, ky);
    });
}

template <class E, int K>
constexpr RowKernels<E> kRowKernels{conv_rows<E, K>, weight_rows<E, K>};

#if defined(__AVX512BF16__)
// The same for pairs and every second kernel row. Pair j of `in` meets pair j + i of dy in kernel
// row 2 i; in kernel row 2 i + 1 (kBetween) the lower row of that pair and the upper one of the
// next, which are taken as (upper, lower) and meet the pair of `in` turned about.
template <int K, int G, bool kBetween>
CONVNEST_INLINE void weight_pair_group(const WeightRows<RowPair>& w, int first) {
    constexpr int L = kLanes<RowPair>;
    Floats sum[G][K] = {};
    const std::int64_t pairs = (w.count + w.odd + 1) / 2;
    const auto exists = [&](std::int64_t i) { return i >= w.begin && i < w.end; };
    for (std::int64_t j = 0; j < pairs; ++j) {
        const RowPair* in = w.in + j * w.plan.width() * L;
        over_tiles<RowPair, K>(
            w.width, w.plan, [&](auto tile, std::int64_t x) CONVNEST_INLINE_LAMBDA {
                using T = decltype(tile);
                Words values[T::kColumns];
                unroll<T::kColumns>([&](auto t) CONVNEST_INLINE_LAMBDA {
                    const Words pair = load(in + (x + t) * L);
                    values[t] = kBetween ? pair << 16 | pair >> 16 : pair;
                });
                unroll<G>([&](auto g) CONVNEST_INLINE_LAMBDA {
                    const std::int64_t i = j + first + g;
                    const bool here = exists(i), next = kBetween && exists(i + 1);
                    if (!here && !next) return;
                    const RowPair* upper = w.rows[here ? i : i + 1] + x * L;
                    const RowPair* lower = w.rows[next ? i + 1 : i] + x * L;
                    const RowPair upper_mask = here ? 0xffff0000u : 0u,
                                  lower_mask = next ? 0xffffu : 0u;
                    add_products<K, T>(
                        values,
                        [&](int k) CONVNEST_INLINE_LAMBDA {
                            if constexpr (!kBetween) return load(upper + k * L);
                            return (load(upper + k * L) & upper_mask) |
                                   (load(lower + k * L) & lower_mask);
                        },
                        sum[g]);
                });
            });
    }
    add_sums<float, K, G>(w.dweight_flip, 2 * first + kBetween, 2, sum);
}

template <int K>
void weight_pairs(const WeightRows<RowPair>& w) {
    constexpr int kMost = kernel_rows_at_once<K>(), kEven = (K + 1) / 2, kOdd = K / 2;
    // As even as they can be: a single kernel row would wait for its sums.
    constexpr int kParts = (kEven + kMost - 1) / kMost, G = (kEven + kParts - 1) / kParts;
    over_kernel_rows<kEven, G>([&](auto G, int first) CONVNEST_INLINE_LAMBDA {
        weight_pair_group<K, decltype(G)::value, false>(w, first);
    });
    constexpr int kFew = kOdd < kMost ? kOdd : kMost;
    over_kernel_rows<kOdd, kFew>([&](auto G, int first) CONVNEST_INLINE_LAMBDA {
        weight_pair_group<K, decltype(G)::value, true>(w, first);
    });
}

template <int K>
constexpr RowKernels<RowPair> kRowKernels<RowPair, K>{conv_rows<RowPair, K>, weight_pairs<K>};
#endif

template <class A>
RowKernels<A> choose(int K) {
    switch (K) {
        case 3: return kRowKernels<A, 3>;
        case 5: return kRowKernels<A, 5>;
        case 7: return kRowKernels<A, 7>;
        case 9: return kRowKernels<A, 9>;
        case 11: return kRowKernels<A, 11>;
        default: return kRowKernels<A, 13>;
    }
}

}  // namespace

void row_kernels(int K, RowKernels<float>* kernels) { *kernels = choose<float>(K); }
#if !defined(CONVNEST_FLOAT32_ONLY)
void row_kernels(int K, RowKernels<double>* kernels) { *kernels = choose<double>(K); }
#endif
#if defined(__AVX512BF16__)
void row_kernels(int K, RowKernels<RowPair>* kernels) { *kernels = choose<RowPair>(K); }
#endif

}  // namespace convnest::CONVNEST_ISA
