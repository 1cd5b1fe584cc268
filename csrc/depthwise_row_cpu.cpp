// The formulas and the layout are in depthwise_row.h. One call does one vector of channels.
//
// conv_rows: a register tile is R output rows x T columns. Each kernel row is K weight vectors held
// in registers, slid over T + K - 1 input vectors that are loaded once. With 32 registers R = 2, so
// that 14 sums in flight hide the latency of the multiply-add and an input row serves two outputs.
// weight_rows: G kernel rows x K sums stay in registers over all pixels of all rows; a tile of T
// input vectors meets T + K - 1 vectors of each of G rows of dy.
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
template <class A, int K, class F>
CONVNEST_INLINE void over_tiles(std::int64_t width, TilePlan plan, F&& f) {
    constexpr int p = K / 2;
    constexpr bool kSkip = sizeof(A) == 4 && K <= 7;
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

// One input row into the sums of one or two output rows. For the lower output row it is kernel row
// ky, for the upper one ky - 1; `weight` is at kernel row ky.
template <class A, int K, class T, int R, bool kFirstRow, bool kSecondRow>
CONVNEST_INLINE void add_input_row(const A* in, const A* weight, Vec<A> (&sum)[R][T::kColumns]) {
    constexpr int L = kLanes<A>;
    Vec<A> lower[K], upper[K];
    unroll<K>([&](auto kx) CONVNEST_INLINE_LAMBDA {
        if constexpr (kFirstRow) lower[kx] = load(weight + kx * L);
        if constexpr (kSecondRow) upper[kx] = load(weight + (kx - K) * L);
    });
    unroll<T::kLast - T::kFirst>([&](auto step) CONVNEST_INLINE_LAMBDA {
        constexpr int j = decltype(step)::value + T::kFirst;
        const Vec<A> value = load(in + j * L);
        unroll<K>([&](auto kx) CONVNEST_INLINE_LAMBDA {
            constexpr int t = j - decltype(kx)::value;
            if constexpr (t >= 0 && t < T::kColumns) {
                if constexpr (kFirstRow) sum[0][t] += value * lower[kx];
                if constexpr (kSecondRow) sum[R - 1][t] += value * upper[kx];
            }
        });
    });
}

template <class A, int K, int R>
CONVNEST_INLINE void conv_row_group(const ConvRows<A>& c, std::int64_t y) {
    constexpr int L = kLanes<A>;
    const A* const* rows = c.rows + y;
    const std::int64_t begin = c.begin > y ? c.begin - y : 0;
    const std::int64_t end = c.end - y < K + R - 1 ? c.end - y : K + R - 1;
    over_tiles<A, K>(c.width, c.plan, [&](auto tile, std::int64_t x) CONVNEST_INLINE_LAMBDA {
        using T = decltype(tile);
        Vec<A> sum[R][T::kColumns] = {};
        std::int64_t i = begin;
        if constexpr (R == 1) {
            for (; i < end; ++i) {
                add_input_row<A, K, T, 1, true, false>(rows[i] + x * L, c.weight + i * K * L, sum);
            }
        } else {
            if (i == 0 && i < end) {
                add_input_row<A, K, T, R, true, false>(rows[0] + x * L, c.weight, sum);
                ++i;
            }
            for (; i < (end < K ? end : K); ++i) {
                add_input_row<A, K, T, R, true, true>(rows[i] + x * L, c.weight + i * K * L, sum);
            }
            if (i < end) {
                add_input_row<A, K, T, R, false, true>(rows[K] + x * L, c.weight + K * K * L, sum);
            }
        }
        const std::int64_t columns = c.width - x < T::kColumns ? c.width - x : T::kColumns;
        unroll<R>([&](auto r) CONVNEST_INLINE_LAMBDA {
            A* out = c.out + (y + r) * c.out_row + x * c.out_pixel;
            unroll<T::kColumns>([&](auto t) CONVNEST_INLINE_LAMBDA {
                if (t < columns) store(out + t * c.out_pixel, sum[r][t]);
            });
        });
    });
}

template <class A, int K>
void conv_rows(const ConvRows<A>& c) {
    std::int64_t y = 0;
    if constexpr (kManyRegisters && sizeof(A) == 4) {
        for (; y + 2 <= c.count; y += 2) conv_row_group<A, K, 2>(c, y);
    }
    for (; y < c.count; ++y) conv_row_group<A, K, 1>(c, y);
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
                unroll<T::kLast - T::kFirst>([&](auto step) CONVNEST_INLINE_LAMBDA {
                    constexpr int j = decltype(step)::value + T::kFirst;
                    const Vec<A> slope = load(dy + j * L);
                    unroll<K>([&](auto kx) CONVNEST_INLINE_LAMBDA {
                        constexpr int t = j - decltype(kx)::value;
                        if constexpr (t >= 0 && t < T::kColumns) sum[g][kx] += values[t] * slope;
                    });
                });
            });
        });
    }
    unroll<G>([&](auto g) CONVNEST_INLINE_LAMBDA {
        unroll<K>([&](auto kx) CONVNEST_INLINE_LAMBDA {
            A* dw = w.dweight_flip + ((ky + g) * K + kx) * L;
            store(dw, load(dw) + sum[g][kx]);
        });
    });
}

// As many kernel rows at once as leave room for a tile and a moving vector in the registers.
template <class A, int K>
void weight_rows(const WeightRows<A>& w) {
    constexpr int kRegisters = kManyRegisters ? 32 : 16;
    constexpr int kFit = (kRegisters - kLargeTile - 1) / K;
    constexpr int G = kFit < 1 ? 1 : (kFit > 3 ? 3 : kFit);
    int ky = 0;
    for (; ky + G <= K; ky += G) weight_row_group<A, K, G>(w, ky);
    if constexpr (K % G == 1) weight_row_group<A, K, 1>(w, ky);
    if constexpr (K % G == 2) weight_row_group<A, K, 2>(w, ky);
}

template <class A, int K>
constexpr RowKernels<A> kRowKernels{conv_rows<A, K>, weight_rows<A, K>};

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

}  // namespace convnest::CONVNEST_ISA
