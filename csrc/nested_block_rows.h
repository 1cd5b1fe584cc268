// The forward pass of nested_block on the rows of one band; the formula is in nested_block.h.
//
// A band marches down its image: the rows that a step still needs pass the first layer into
// scratch memory and enter the ring of z; the step's rows are convolved, pass the outer GELU in
// place, the second layer and the last norm. g of the rows about an edge, which two bands need, can
// be made before them, for both. Backward uses all this to compute h and u again.
#pragma once

#include <type_traits>

#include "common/partition.h"
#include "linear_rows.h"
#include "nested_block.h"
#include "nested_conv_rows.h"

namespace convnest::CONVNEST_ISA {
namespace {

// As the operand of a linear layer, rounded to it; products treat subnormal numbers as 0.
template <class A, int N>
CONVNEST_INLINE void store_operand(A* p, const Pack<A, N>& pack) {
    store_all(p, pack);
}
template <int N>
CONVNEST_INLINE void store_operand(BFloat16* p, const Pack<float, N>& pack) {
    unroll<N>([&](auto i) CONVNEST_INLINE_LAMBDA {
        const Halves bits = narrow_normal(pack.v[i], BFloat16{});
        __builtin_memcpy(p + i * kLanes<float>, &bits, sizeof bits);
    });
}
// The same of a value that T stores, T being what is not an operand by itself.
template <class T, class E, int N>
CONVNEST_INLINE void store_rounded(E* p, const Pack<Accumulate<E>, N>& pack) {
    if constexpr (std::is_same<T, E>::value) {
        store_operand(p, pack);
    } else {
        store_operand(p, rounded_to<T>(pack));
    }
}

template <class T>
struct NestedBlockRows {
    using A = Accumulate<T>;
    using E = typename OperandOf<T>::type;
    using Packed = typename Operand<E>::Packed;

    const NestedBlockFwdParams& p;
    NestedConvRows<T> wide;
    std::int64_t narrow;  // C rounded up to whole vectors
    const T* given_h;     // [N, H, W, D]: h, not to be computed; or null
    Packed *fc1_weight, *fc2_weight;
    A *fc1_bias, *fc2_bias, *post_weight, *post_bias, *scale;
    // How the weights are packed, until it is done.
    struct Packing {
        WeightCopy<typename TapOf<T>::type> conv;
        PackLinear<E> fc1, fc2;
    } packing;

    // One worker's memory. h, then v in the operand type, share the memory of the convolution's
    // result.
    struct Scratch {
        typename NestedConvRows<T>::Scratch wide;
        E* x;  // [S][W][Cp], unless the first layer can read the tensor itself
        A* t;  // [S][W][Cp]
    };

    static NestedBlockRows plan(const NestedBlockFwdParams& p) {
        return {p,
                NestedConvRows<T>::plan(p.H, p.W, p.D, p.K, p.eps, p.shortcut),
                padded_channels<A>(p.C),
                {},
                {},
                {},
                {},
                {},
                {},
                {},
                {},
                {}};
    }

    // Whether a row of x is an operand as it is; pairs want an even number of channels.
    bool reads_x() const { return std::is_same<T, E>::value && p.C % Operand<E>::kStep == 0; }

    // The three weights, packed: memory of the caller's, or of this call.
    void take_weights(Carver& carver) {
        wide.take_weights(carver);
        fc1_weight = carver.take<Packed>(packed_elements<E>(p.C, p.D));
        fc2_weight = carver.take<Packed>(packed_elements<E>(p.D, p.C));
    }
    // Backward needs no layer that it does not run again.
    void pack_weights(Phases& work) {
        packing = {wide.weight_copy(p.conv_weight),
                   {static_cast<const A*>(p.fc1_weight), p.C, 1, fc1_weight, p.C, p.D},
                   {static_cast<const A*>(p.fc2_weight), p.D, 1, fc2_weight, p.D, p.C}};
        work.add(packing.conv.units());
        if (p.fc1_weight != nullptr) work.add(pack_units(packing.fc1));
        if (p.fc2_weight != nullptr) work.add(pack_units(packing.fc2));
    }

    void take_parameters(Carver& carver) {
        if (p.packed == nullptr) take_weights(carver);
        wide.take_vectors(carver);
        fc1_bias = carver.take<A>(wide.step.channels);
        for (A** at : {&fc2_bias, &post_weight, &post_bias, &scale}) *at = carver.take<A>(narrow);
    }

    // With the weights' packing as the first phases of `work`.
    void copy_parameters(Phases& work) {
        if (p.packed == nullptr) {
            pack_weights(work);
        } else {
            Carver packed(static_cast<char*>(const_cast<void*>(p.packed)));
            take_weights(packed);
        }
        wide.copy_vectors({p.conv_bias, p.norm_weight, p.norm_bias});
        copy_parameter(p.fc1_bias, A(0), p.D, fc1_bias);
        copy_parameter(p.fc2_bias, A(0), p.C, fc2_bias);
        copy_parameter(p.post_weight, A(1), p.C, post_weight);
        copy_parameter(p.post_bias, A(0), p.C, post_bias);
        copy_parameter(p.scale, A(1), p.C, scale);
    }

    Scratch take_scratch(Carver& carver) const {
        Scratch s;
        s.wide = wide.take_scratch(carver);
        s.x = carver.take<E>(reads_x() ? 0 : wide.step.rows * p.W * narrow);
        s.t = carver.take<A>(wide.step.rows * p.W * narrow);
        return s;
    }

    // h and u, from pixel `origin` on; null: not kept.
    struct Kept {
        T *h, *u;
        std::int64_t origin;
    };

    // g of the K - 1 rows about an edge of a band, as make_edge_row leaves it; null: the band
    // computes its neighbour's rows again.
    struct Edges {
        const A *above, *below;
    };
    std::int64_t edge_row() const { return p.W * wide.step.pixel; }

    void run_band(const Scratch& s, std::int64_t n, Range band, const Kept& kept,
                  const Edges& edges = {}) const {
        const auto& step = wide.step;
        const Range inner{edges.above == nullptr ? 0 : band.begin + p.K / 2,
                          edges.below == nullptr ? p.H : band.end - p.K / 2};
        std::int64_t entered = step.first_row(band.begin);
        for (std::int64_t y = band.begin, count; y < band.end; y += count) {
            count = step.count(y, band.end);
            const std::int64_t end = step.end_row(y + count);
            for (; entered < end && entered < inner.begin; ++entered) {
                enter_edge_row(s, n, entered, band,
                               edges.above + (entered - band.begin + p.K / 2) * edge_row());
            }
            while (entered < end && entered < inner.end) {
                const std::int64_t left = (end < inner.end ? end : inner.end) - entered;
                const std::int64_t rows = left < step.rows ? left : step.rows;
                enter_rows(s, n, entered, rows, band, kept);
                entered += rows;
            }
            for (; entered < end; ++entered) {
                enter_edge_row(s, n, entered, band,
                               edges.below + (entered - inner.end) * edge_row());
            }
            wide.convolve(s.wide, y, count);
            leave_rows(s, n, y, count, kept);
        }
    }

    // g of image row y of n, and h where it is kept.
    void make_edge_row(const Scratch& s, std::int64_t n, std::int64_t y, const Kept& kept,
                       A* g) const {
        const std::int64_t first = (n * p.H + y) * p.W;
        expand(s, first, p.W);
        for (std::int64_t x = 0; x < p.W; ++x) {
            T* kept_h = kept.h == nullptr ? nullptr : kept.h + (first + x - kept.origin) * p.D;
            const std::int64_t at = x * wide.step.pixel;
            over_channels<A>(p.D, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                const auto h = rounded_to<T>(load_all(s.wide.conv + at + c, lanes));
                if (kept_h != nullptr) store_as(kept_h + c, h, lanes);
                store_all(g + at + c, gelu_of<T>(h));
            });
        }
    }

    void enter_edge_row(const Scratch& s, std::int64_t n, std::int64_t y, Range band,
                        const A* g) const {
        const auto owned = statistics_of(n, y, band);
        wide.enter_row(s.wide, y, wide.step.first_row(band.begin), owned.mean, owned.rstd,
                       [&](std::int64_t x, std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                           return load_all(g + x * wide.step.pixel + c, lanes);
                       });
    }

    // Where those of image row y go; null: they are not kept, or not by this band.
    struct RowStatistics {
        A *mean, *rstd;
    };
    RowStatistics statistics_of(std::int64_t n, std::int64_t y, Range band) const {
        const std::int64_t row = (n * p.H + y) * p.W;
        if (y < band.begin || y >= band.end) return {};
        return {p.mean == nullptr ? nullptr : static_cast<A*>(p.mean) + row,
                p.rstd == nullptr ? nullptr : static_cast<A*>(p.rstd) + row};
    }

    void enter_rows(const Scratch& s, std::int64_t n, std::int64_t y, std::int64_t count,
                    Range band, const Kept& kept) const {
        const std::int64_t first = (n * p.H + y) * p.W, stride = wide.step.pixel;
        const std::int64_t first_row = wide.step.first_row(band.begin);
        if (given_h == nullptr) expand(s, first, count * p.W);
        for (std::int64_t r = 0; r < count; ++r) {
            const std::int64_t row = first + r * p.W;
            const auto owned = statistics_of(n, y + r, band);
            if (given_h != nullptr) {
                const T* h = given_h + row * p.D;
                wide.enter_row(s.wide, y + r, first_row, owned.mean, owned.rstd,
                               [&](std::int64_t i, std::int64_t c, auto lanes)
                                   CONVNEST_INLINE_LAMBDA {
                                       return gelu_of<T>(load_as(h + i * p.D + c, lanes));
                                   });
                continue;
            }
            const A* h = s.wide.conv + r * p.W * stride;
            const bool keeps = kept.h != nullptr && y + r >= band.begin && y + r < band.end;
            T* kept_h = keeps ? kept.h + (row - kept.origin) * p.D : nullptr;
            wide.enter_row(s.wide, y + r, first_row, owned.mean, owned.rstd,
                           [&](std::int64_t i, std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                               const auto value =
                                   rounded_to<T>(load_all(h + i * stride + c, lanes));
                               if (kept_h != nullptr) store_as(kept_h + i * p.D + c, value, lanes);
                               return gelu_of<T>(value);
                           });
        }
    }

    // h of some pixels, in the memory of the convolution's result.
    void expand(const Scratch& s, std::int64_t first, std::int64_t pixels) const {
        const T* x = static_cast<const T*>(p.x) + first * p.C;
        LinearRows<E> layer{s.x,    narrow, fc1_weight, fc1_bias, s.wide.conv, wide.step.pixel,
                            pixels, p.C,    p.D};
        if (reads_x()) {
            layer.x = reinterpret_cast<const E*>(x);
            layer.x_stride = p.C;
        } else {
            for (std::int64_t i = 0; i < pixels; ++i) {
                over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                    store_operand(s.x + i * narrow + c, load_as(x + i * p.C + c, lanes));
                });
            }
        }
        linear_rows(layer);
    }

    void leave_rows(const Scratch& s, std::int64_t n, std::int64_t y, std::int64_t count,
                    const Kept& kept) const {
        const std::int64_t first = (n * p.H + y) * p.W, stride = wide.step.pixel;
        // In place, pixel by pixel: an operand is no larger than what it takes the place of.
        E* v = reinterpret_cast<E*>(s.wide.conv);
        for (std::int64_t r = 0; r < count; ++r) {
            T* u_row = kept.u == nullptr ? nullptr : kept.u + (first + r * p.W - kept.origin) * p.D;
            E* v_row = v + r * p.W * stride;
            wide.leave_row(
                s.wide, y + r, r, u_row,
                [&](std::int64_t i, std::int64_t c, const auto& value, auto)
                    CONVNEST_INLINE_LAMBDA { store_rounded<T>(v_row + i * stride + c, value); });
        }
        if (p.y == nullptr && p.t == nullptr) return;
        linear_rows(
            LinearRows<E>{v, stride, fc2_weight, fc2_bias, s.t, narrow, count * p.W, p.D, p.C});
        for (std::int64_t i = 0; i < count * p.W; ++i) leave_pixel(s.t + i * narrow, first + i);
    }

    void leave_pixel(A* t, std::int64_t pixel) const {
        const T* x = static_cast<const T*>(p.x) + pixel * p.C;
        T* kept = p.t == nullptr ? nullptr : static_cast<T*>(p.t) + pixel * p.C;
        ChannelSum<A> sum;
        over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
            const auto value = rounded_to<T>(load_all(t + c, lanes));
            store_all(t + c, value);
            if (kept != nullptr) store_as(kept + c, value, lanes);
            sum.add(value);
        });
        const auto stats = row_statistics(t, p.C, sum.total(), static_cast<A>(p.eps));
        if (p.post_mean != nullptr) static_cast<A*>(p.post_mean)[pixel] = stats.mean;
        if (p.post_rstd != nullptr) static_cast<A*>(p.post_rstd)[pixel] = stats.rstd;
        if (p.y == nullptr) return;
        T* y = static_cast<T*>(p.y) + pixel * p.C;
        over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
            const auto xhat = (load_all(t + c, lanes) - stats.mean) * stats.rstd;
            const auto norm =
                xhat * load_all(post_weight + c, lanes) + load_all(post_bias + c, lanes);
            store_as(y + c, load_as(x + c, lanes) * load_all(scale + c, lanes) + norm, lanes);
        });
    }
};

}  // namespace
}  // namespace convnest::CONVNEST_ISA
