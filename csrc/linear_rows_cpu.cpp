// The formula and the layout are in linear_rows.h.
#include "linear_rows.h"

namespace convnest::CONVNEST_ISA {
namespace {

// P x V sums, V weights and a broadcast input fit the registers: 32 of AVX-512, else 16. Per k the
// 8 x 3 tile loads 11 times for 24 multiply-adds, within the two loads that go with two of these;
// 7 x 4 leaves no register for the input, and loads it for every one (both measured on Zen 5: 98%
// and 85% of the multiply-add rate).
constexpr bool kManyRegisters = kVectorBytes == 64;
constexpr int kPanel = kManyRegisters ? 3 : 2;
constexpr int kRowTile = kManyRegisters ? 8 : 6;
// The part of a panel that stays in the L1 cache while all rows pass.
constexpr std::int64_t kPanelBytes = 24 << 10;

// sum += x w, for one broadcast element (or pair) of a row and a vector of weights.
template <class A>
CONVNEST_INLINE Vec<A> multiply_add(Vec<A> sum, const A* x, const A* weight) {
    return sum + *x * load(weight);
}
#if defined(__AVX512BF16__)
CONVNEST_INLINE Floats multiply_add(Floats sum, const BFloat16* x, const std::uint32_t* weight) {
    std::int32_t pair;
    __builtin_memcpy(&pair, x, sizeof pair);
    __m512i weights;
    __builtin_memcpy(&weights, weight, sizeof weights);
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights,
                                    (__m512bh)_mm512_set1_epi32(pair));
}
#endif

// y[i, v] += sum_k x[i, k] w[k, v] for `count` steps of k, from the bias where kFirst is set.
// Consecutive rows of x and of y lie x_row and y_row apart, consecutive k of x and w x_k and w_k.
template <class E, int P, int V, bool kFirst>
CONVNEST_INLINE void tile(const E* x, std::int64_t x_row, std::int64_t x_k,
                          const typename Operand<E>::Packed* weight, std::int64_t w_k,
                          std::int64_t count, const Accumulate<E>* bias, Accumulate<E>* y,
                          std::int64_t y_row) {
    using A = Accumulate<E>;
    constexpr int L = kLanes<A>;
    Vec<A> sum[P][V];
    unroll<P>([&](auto i) CONVNEST_INLINE_LAMBDA {
        unroll<V>([&](auto v) CONVNEST_INLINE_LAMBDA {
            sum[i][v] = kFirst ? load(bias + v * L) : load(y + i * y_row + v * L);
        });
    });
    for (std::int64_t k = 0; k < count; ++k) {
        unroll<P>([&](auto i) CONVNEST_INLINE_LAMBDA {
            unroll<V>([&](auto v) CONVNEST_INLINE_LAMBDA {
                sum[i][v] = multiply_add(sum[i][v], x + i * x_row + k * x_k, weight + v * L);
            });
        });
        weight += w_k;
    }
    unroll<P>([&](auto i) CONVNEST_INLINE_LAMBDA {
        unroll<V>([&](auto v) CONVNEST_INLINE_LAMBDA { store(y + i * y_row + v * L, sum[i][v]); });
    });
}

// f(P, row) for tiles of P rows.
template <class F>
CONVNEST_INLINE void over_rows(std::int64_t rows, F&& f) {
    std::int64_t row = 0;
    const auto step = [&](auto P) CONVNEST_INLINE_LAMBDA {
        for (; row + P <= rows; row += P) f(P, row);
    };
    step(Constant<kRowTile>{});
    step(Constant<4>{});
    step(Constant<2>{});
    step(Constant<1>{});
}

// Steps [k, k + count) of the panel of V vectors from `first` on, for all rows.
template <class E, int V, bool kFirst>
void panel_rows(const LinearRows<E>& l, std::int64_t first, std::int64_t k, std::int64_t count) {
    constexpr int L = kLanes<Accumulate<E>>;
    const std::int64_t column = first * L;
    const auto* weight = l.weight + column * packed_steps<E>(l.K) + k * V * L;
    const E* x = l.x + k * Operand<E>::kStep;
    over_rows(l.rows, [&](auto P, std::int64_t row) CONVNEST_INLINE_LAMBDA {
        tile<E, decltype(P)::value, V, kFirst>(x + row * l.x_stride, l.x_stride, Operand<E>::kStep,
                                               weight, V * L, count, l.bias + column,
                                               l.y + row * l.y_stride + column, l.y_stride);
    });
}

template <class E, int V>
void panel_of(const LinearRows<E>& l, std::int64_t first) {
    constexpr std::int64_t kCount = kPanelBytes / (V * kVectorBytes);
    const std::int64_t steps = packed_steps<E>(l.K);
    panel_rows<E, V, true>(l, first, 0, steps < kCount ? steps : kCount);
    for (std::int64_t k = kCount; k < steps; k += kCount) {
        panel_rows<E, V, false>(l, first, k, steps - k < kCount ? steps - k : kCount);
    }
}

// The i-th of the panels that `blocks` vectors are cut into. A last panel of a single vector would
// wait for its loads: it shares the vectors of the one before.
struct Panel {
    std::int64_t first, vectors;
};
CONVNEST_INLINE std::int64_t panel_count(std::int64_t blocks) {
    return (blocks + kPanel - 1) / kPanel;
}
CONVNEST_INLINE Panel panel_at(std::int64_t blocks, std::int64_t i) {
    const std::int64_t first = i * kPanel, last = panel_count(blocks) - 1;
    const bool share = kPanel == 3 && last > 0 && blocks % kPanel == 1;
    if (share && i == last) return {first - 1, 2};
    if (share && i == last - 1) return {first, 2};
    return {first, blocks - first < kPanel ? blocks - first : kPanel};
}

// f(V, first vector) for all panels.
template <class F>
CONVNEST_INLINE void over_panels(std::int64_t blocks, F&& f) {
    for (std::int64_t i = 0; i < panel_count(blocks); ++i) {
        const Panel panel = panel_at(blocks, i);
        unroll<kPanel>([&](auto v) CONVNEST_INLINE_LAMBDA {
            constexpr int V = decltype(v)::value + 1;
            if (panel.vectors == V) f(Constant<V>{}, panel.first);
        });
    }
}

template <class E>
void all_panels(const LinearRows<E>& l) {
    over_panels(block_count<Accumulate<E>>(l.M),
                [&](auto V, std::int64_t first) { panel_of<E, decltype(V)::value>(l, first); });
}

template <class A, int V>
void outer_panel(const OuterRows<A>& o, std::int64_t column) {
    over_rows(o.M, [&](auto P, std::int64_t m) CONVNEST_INLINE_LAMBDA {
        tile<A, decltype(P)::value, V, false>(o.a + m, 1, o.a_stride, o.b + column, o.b_stride,
                                              o.rows, nullptr, o.sum + m * o.sum_stride + column,
                                              o.sum_stride);
    });
}

template <class A>
void all_columns(const OuterRows<A>& o) {
    over_panels(o.columns / kLanes<A>, [&](auto V, std::int64_t first) {
        outer_panel<A, decltype(V)::value>(o, first * kLanes<A>);
    });
}

template <class A>
struct Indices;
template <>
struct Indices<float> {
    typedef std::int32_t type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Indices<double> {
    typedef std::int64_t type __attribute__((vector_size(kVectorBytes)));
};

// An L x L matrix, row by row: blocks off the diagonal change places, from size 1 to L / 2.
template <class A>
CONVNEST_INLINE void transpose(Vec<A> (&row)[kLanes<A>]) {
    constexpr int L = kLanes<A>;
    constexpr int kSteps = L == 16 ? 4 : L == 8 ? 3 : L == 4 ? 2 : 1;
    unroll<kSteps>([&](auto step) CONVNEST_INLINE_LAMBDA {
        constexpr int size = 1 << decltype(step)::value;
        typename Indices<A>::type upper, lower;
        for (int i = 0; i < L; ++i) {
            upper[i] = (i & size) != 0 ? L + (i ^ size) : i;
            lower[i] = (i & size) != 0 ? L + i : i ^ size;
        }
        unroll<L>([&](auto i) CONVNEST_INLINE_LAMBDA {
            constexpr int at = decltype(i)::value;
            if constexpr ((at & size) == 0) {
                const Vec<A> a = row[at], b = row[at + size];
                row[at] = __builtin_shuffle(a, b, upper);
                row[at + size] = __builtin_shuffle(a, b, lower);
            }
        });
    });
}

// L values of k of one vector of outputs, a row of `values` each, into packed elements.
template <class A>
CONVNEST_INLINE void store_packed(const Vec<A>* values, int count, A* packed, std::int64_t width) {
    for (int i = 0; i < count; ++i) store(packed + i * width, values[i]);
}
CONVNEST_INLINE void store_packed(const Floats* values, int count, std::uint32_t* packed,
                                  std::int64_t width) {
    for (int i = 0; i < count; i += 2) {
        const Floats next = i + 1 < count ? values[i + 1] : Floats{};
        const Words low = __builtin_convertvector(narrow(values[i], BFloat16{}), Words);
        const Words high = __builtin_convertvector(narrow(next, BFloat16{}), Words);
        const Words pairs = low | high << 16;
        __builtin_memcpy(packed + i / 2 * width, &pairs, sizeof pairs);
    }
}

// One vector of outputs from m on, with `width` packed elements from one step of k to the next.
template <class E>
void pack_vector(const PackLinear<E>& p, std::int64_t m, typename Operand<E>::Packed* packed,
                 std::int64_t width) {
    using A = Accumulate<E>;
    constexpr int L = kLanes<A>;
    const A* weight = p.weight + m * p.m_stride;
    const int present = static_cast<int>(p.M - m < L ? p.M - m : L);
    for (std::int64_t k = 0; k < p.K; k += L) {
        const A* at = weight + k * p.k_stride;
        const int count = static_cast<int>(p.K - k < L ? p.K - k : L);
        Vec<A> values[L] = {};
        if (present == L && count == L && p.k_stride == 1) {
            for (int i = 0; i < L; ++i) values[i] = load(at + i * p.m_stride);
            transpose<A>(values);
        } else if (present == L && p.m_stride == 1) {
            for (int i = 0; i < count; ++i) values[i] = load(at + i * p.k_stride);
        } else {
            for (int i = 0; i < count; ++i) {
                for (int j = 0; j < present; ++j) {
                    values[i][j] = at[j * p.m_stride + i * p.k_stride];
                }
            }
        }
        store_packed(values, count, packed + k / Operand<E>::kStep * width, width);
    }
}

template <class E>
void pack_panel(std::int64_t unit, char*, void* context) {
    const PackLinear<E>& p = *static_cast<const PackLinear<E>*>(context);
    constexpr int L = kLanes<Accumulate<E>>;
    const Panel panel = panel_at(block_count<Accumulate<E>>(p.M), unit);
    auto* packed = p.packed + panel.first * L * packed_steps<E>(p.K);
    for (std::int64_t v = 0; v < panel.vectors; ++v) {
        pack_vector(p, (panel.first + v) * L, packed + v * L, panel.vectors * L);
    }
}

template <class E>
void pack(PackLinear<E> p) {
    run_units({panel_count(block_count<Accumulate<E>>(p.M)), 0, nullptr, pack_panel<E>, &p});
}

}  // namespace

void outer_rows(const OuterRows<float>& o) { all_columns(o); }
void outer_rows(const OuterRows<double>& o) { all_columns(o); }
void linear_rows(const LinearRows<float>& l) { all_panels(l); }
void linear_rows(const LinearRows<double>& l) { all_panels(l); }
void pack_linear(const PackLinear<float>& p) { pack(p); }
void pack_linear(const PackLinear<double>& p) { pack(p); }
#if defined(__AVX512BF16__)
void linear_rows(const LinearRows<BFloat16>& l) { all_panels(l); }
void pack_linear(const PackLinear<BFloat16>& p) { pack(p); }
#endif

}  // namespace convnest::CONVNEST_ISA
