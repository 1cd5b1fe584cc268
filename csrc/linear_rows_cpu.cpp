// The formula and the layout are in linear_rows.h.
#include "linear_rows.h"

namespace convnest::CONVNEST_ISA {
namespace {

// P x V sums, V weights and a broadcast input fit the registers: 32 of AVX-512, else 16. Per k the
// 8 x 3 tile loads 11 times for 24 multiply-adds, within the two loads that go with two of these;
// 7 x 4 leaves no register for the input, and loads it for every one (both measured on Zen 5: 98%
// and 85% of the multiply-add rate).
constexpr int kRowTile = kVectorBytes == 64 ? 8 : 6;
// The part of a panel that stays in the L1 cache while all rows pass: at most this, 144 steps of
// float (a slice of nested_block_slices.h), and cut evenly, since each part reads and writes y.
constexpr std::int64_t kPanelBytes = 28 << 10;

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

// What a sum starts from.
enum class Start { kY, kBias, kZero };

// y[i, v] = start + sum_k x[i, k] w[k, v] for `count` steps of k.
// Consecutive rows of x and of y lie x_row and y_row apart, consecutive k of x and w x_k and w_k.
// With kAsk each step asks for a cache line from the address `ahead` on, to be in L2 later; a
// number, since it may lie beyond the weights.
template <class E, int P, int V, Start kStart, bool kAsk = false>
CONVNEST_INLINE void tile(const E* x, std::int64_t x_row, std::int64_t x_k,
                          const typename Operand<E>::Packed* weight, std::int64_t w_k,
                          std::int64_t count, const Accumulate<E>* bias, Accumulate<E>* y,
                          std::int64_t y_row, std::uintptr_t ahead = 0) {
    using A = Accumulate<E>;
    constexpr int L = kLanes<A>;
    Vec<A> sum[P][V];
    unroll<P>([&](auto i) CONVNEST_INLINE_LAMBDA {
        unroll<V>([&](auto v) CONVNEST_INLINE_LAMBDA {
            if constexpr (kStart == Start::kY) sum[i][v] = load(y + i * y_row + v * L);
            if constexpr (kStart == Start::kBias) sum[i][v] = load(bias + v * L);
            if constexpr (kStart == Start::kZero) sum[i][v] = Vec<A>{};
        });
    });
    for (std::int64_t k = 0; k < count; ++k) {
        if constexpr (kAsk) {
            __builtin_prefetch(reinterpret_cast<const void*>(ahead + k * kVectorBytes), 0, 2);
        }
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

// f(V, panel, its first vector) for the panels in `range`.
template <class F>
CONVNEST_INLINE void over_panels(std::int64_t blocks, Range range, F&& f) {
    for (std::int64_t i = range.begin; i < range.end; ++i) {
        const Panel panel = panel_at(blocks, i);
        unroll<kPanel>([&](auto v) CONVNEST_INLINE_LAMBDA {
            constexpr int V = decltype(v)::value + 1;
            if (panel.vectors == V) f(Constant<V>{}, i, panel.first);
        });
    }
}

// `count` steps from k on of the panel of V vectors from `column` on, for all rows; x and y are at
// their first step and column. While the tiles of rows after the first one run, they ask for the
// weights at `next` (where not null), a V-th each: as many as are in use now.
template <class E, int V, Start kStart>
void panel_rows(const LinearRows<E>& l, const E* x, Accumulate<E>* y, std::int64_t column,
                std::int64_t k, std::int64_t count, const char* next) {
    constexpr int L = kLanes<Accumulate<E>>;
    const auto* weight = l.weight + column * packed_steps<E>(l.K) + k * V * L;
    over_rows(l.rows, [&](auto P, std::int64_t row) CONVNEST_INLINE_LAMBDA {
        const auto run = [&](auto ask, std::uintptr_t ahead) CONVNEST_INLINE_LAMBDA {
            tile<E, decltype(P)::value, V, kStart, decltype(ask)::value != 0>(
                x + row * l.x_stride, l.x_stride, Operand<E>::kStep, weight, V * L, count,
                l.bias + column, y + row * l.y_stride, l.y_stride, ahead);
        };
        const std::int64_t part = row / kRowTile - 1;
        if (P == kRowTile && next != nullptr && part >= 0 && part < V) {
            run(Constant<1>{},
                reinterpret_cast<std::uintptr_t>(next) + part * count * kVectorBytes);
        } else {
            run(Constant<0>{}, 0);
        }
    });
}

// The same for `steps`, in parts; `after` is what comes after the last of them.
template <class E, int V>
void panel_part(const LinearRows<E>& l, std::int64_t column, Accumulate<E>* y, Range steps,
                const char* after) {
    const auto* weight = l.weight + column * packed_steps<E>(l.K);
    constexpr std::int64_t kCount = kPanelBytes / (V * kVectorBytes);
    const std::int64_t total = steps.end - steps.begin, parts = (total + kCount - 1) / kCount;
    for (std::int64_t i = 0; i < parts; ++i) {
        const Range part = part_of(total, parts, i);
        const std::int64_t k = steps.begin + part.begin, count = part.end - part.begin;
        const E* x = l.x + part.begin * Operand<E>::kStep;
        const char* next = after;
        if (after != nullptr && i + 1 < parts) {
            next = reinterpret_cast<const char*>(weight + (k + count) * V * kLanes<Accumulate<E>>);
        }
        if (k == 0) {
            panel_rows<E, V, Start::kBias>(l, x, y, column, k, count, next);
        } else {
            panel_rows<E, V, Start::kY>(l, x, y, column, k, count, next);
        }
    }
}

// `streams`: the weights come from L3 or memory, since the layer has more than an L2 cache holds.
template <class E>
void some_panels(const LinearRows<E>& l, Range panels, Range steps, bool streams) {
    constexpr int L = kLanes<Accumulate<E>>;
    const std::int64_t blocks = block_count<Accumulate<E>>(l.M);
    const std::int64_t origin = panel_at(blocks, panels.begin).first;
    const auto at = [&](std::int64_t i, std::int64_t step) -> const char* {
        if (!streams) return nullptr;
        const Panel panel = panel_at(blocks, i);
        return reinterpret_cast<const char*>(l.weight + panel.first * L * packed_steps<E>(l.K) +
                                             step * panel.vectors * L);
    };
    // What comes after the last panel: the next steps of the first, or the panel after it.
    const char* last = at(0, 0);
    if (steps.end < packed_steps<E>(l.K)) {
        last = at(panels.begin, steps.end);
    } else if (panels.end < panel_count(blocks)) {
        last = at(panels.end, 0);
    }
    over_panels(blocks, panels, [&](auto V, std::int64_t i, std::int64_t first) {
        panel_part<E, decltype(V)::value>(l, first * L, l.y + (first - origin) * L, steps,
                                          i + 1 < panels.end ? at(i + 1, steps.begin) : last);
    });
}

template <class E>
void all_panels(const LinearRows<E>& l) {
    some_panels(l, {0, panel_count(block_count<Accumulate<E>>(l.M))}, {0, packed_steps<E>(l.K)},
                false);
}

// The factors of OuterRows as operands: `steps` of Operand<E>::kStep rows.
template <class E>
struct Factors {
    const E* a;
    std::int64_t a_stride;
    const typename Operand<E>::Packed* b;
    std::int64_t b_stride, steps;
};

template <class E, int V, Start kStart>
void outer_panel(const Factors<E>& f, const OuterRows<Accumulate<E>>& o, std::int64_t column) {
    constexpr int kStep = Operand<E>::kStep;
    over_rows(o.M, [&](auto P, std::int64_t m) CONVNEST_INLINE_LAMBDA {
        tile<E, decltype(P)::value, V, kStart>(f.a + m * kStep, kStep, f.a_stride * kStep,
                                               f.b + column, f.b_stride, f.steps, nullptr,
                                               o.sum + m * o.sum_stride + column, o.sum_stride);
    });
}

template <class E>
void all_columns(const Factors<E>& f, const OuterRows<Accumulate<E>>& o) {
    constexpr int L = kLanes<Accumulate<E>>;
    const std::int64_t blocks = o.columns / L;
    over_panels(blocks, {0, panel_count(blocks)}, [&](auto V, std::int64_t, std::int64_t first) {
        if (o.first) {
            outer_panel<E, decltype(V)::value, Start::kZero>(f, o, first * L);
        } else {
            outer_panel<E, decltype(V)::value, Start::kY>(f, o, first * L);
        }
    });
}

template <class A>
void all_columns(const OuterRows<A>& o) {
    all_columns<A>({o.a, o.a_stride, o.b, o.b_stride, o.rows}, o);
}

#if defined(__AVX512BF16__)
// Rows 2 i and 2 i + 1 of values that bfloat16 holds; after an odd last row comes 0.
CONVNEST_INLINE void pair_rows(const float* rows, std::int64_t stride, std::int64_t count,
                               std::int64_t columns, std::uint32_t* pairs) {
    constexpr int L = kLanes<float>;
    const auto pair = [](auto low, auto high)
                          CONVNEST_INLINE_LAMBDA { return low >> 16 | (high & 0xffff0000u); };
    for (std::int64_t i = 0; i < count; i += 2, rows += 2 * stride, pairs += columns) {
        const bool both = i + 1 < count;
        std::int64_t c = 0;
        for (; c + L <= columns; c += L) {
            const Words high = both ? (Words)load(rows + stride + c) : Words{};
            const Words result = pair((Words)load(rows + c), high);
            __builtin_memcpy(pairs + c, &result, sizeof result);
        }
        for (; c < columns; ++c) {
            std::uint32_t low, high = 0;
            __builtin_memcpy(&low, rows + c, sizeof low);
            if (both) __builtin_memcpy(&high, rows + stride + c, sizeof high);
            pairs[c] = pair(low, high);
        }
    }
}
#endif

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
        const Words low = widen_bits(narrow_normal(values[i], BFloat16{}));
        const Words high = widen_bits(narrow_normal(next, BFloat16{}));
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
Units units_of(PackLinear<E>& p) {
    return {panel_count(block_count<Accumulate<E>>(p.M)), 0, nullptr, pack_panel<E>, &p};
}

}  // namespace

void outer_rows(const OuterRows<float>& o) { all_columns(o); }
void outer_rows(const OuterRows<double>& o) { all_columns(o); }
void linear_rows(const LinearRows<float>& l) { all_panels(l); }
void linear_rows(const LinearRows<double>& l) { all_panels(l); }
void linear_part(const LinearRows<float>& l, Range panels, Range steps) {
    some_panels(l, panels, steps, true);
}
void linear_part(const LinearRows<double>& l, Range panels, Range steps) {
    some_panels(l, panels, steps, true);
}
Units pack_units(PackLinear<float>& p) { return units_of(p); }
Units pack_units(PackLinear<double>& p) { return units_of(p); }
#if defined(__AVX512BF16__)
void outer_rows(const OuterRows<float>& o, std::uint32_t* pairs) {
    const std::int64_t steps = (o.rows + 1) / 2;
    std::uint32_t *b = pairs, *a = pairs + steps * o.columns;
    pair_rows(o.b, o.b_stride, o.rows, o.columns, b);
    pair_rows(o.a, o.a_stride, o.rows, o.M, a);
    all_columns<BFloat16>({reinterpret_cast<const BFloat16*>(a), o.M, b, o.columns, steps}, o);
}
void linear_rows(const LinearRows<BFloat16>& l) { all_panels(l); }
void linear_part(const LinearRows<BFloat16>& l, Range panels, Range steps) {
    some_panels(l, panels, steps, true);
}
Units pack_units(PackLinear<BFloat16>& p) { return units_of(p); }
#endif

}  // namespace convnest::CONVNEST_ISA
