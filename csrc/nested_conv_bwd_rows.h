// The backward pass of nested_conv on the rows of one band, for nested_conv and nested_block, which
// differ in where rows come from and where they go. With g = GELU(h), xhat = (g - mean) rstd,
// z = ln_weight xhat + ln_bias:
//
//   du         = dv GELU'(u)                                dconv_bias = sum du
//   dz[y,x]    = sum_{ky,kx} w[ky,kx] du[y+p-ky, x+p-kx]
//   dw[ky,kx]  = sum_{y,x} z[y,x] du[y+p-ky, x+p-kx]
//   dln_weight = sum dz xhat                                dln_bias = sum dz
//   dg         = rstd (e - mean_c(e) - xhat mean_c(e xhat)) [+ du],   e = dz ln_weight
//   dh         = dg GELU'(h)
//
// A band marches down with a ring of rows of du; only the rows that it owns of xhat and GELU'(h)
// are made again from h. Per vector of channels everything between du and dz then happens while
// its rows are in the L1 cache, with the sums over channels kept per pixel; a last pass over the
// pixels finishes dh.
#pragma once

#include <cstdint>

#include "common/gelu.h"
#include "common/layernorm.h"
#include "common/parameters.h"
#include "depthwise_row.h"
#include "row_step.h"

namespace convnest::CONVNEST_ISA {
namespace {

template <class T>
struct NestedConvBwdRows {
    using A = Accumulate<T>;
    using Tap = typename TapOf<T>::type;
    static constexpr int L = kLanes<A>;

    // Gradients that are needed; `norm`: any of dh, dln_weight, dln_bias.
    struct Wanted {
        bool conv_weight, conv_bias, norm;
    };

    RowStep<Tap> step;
    RowKernels<Tap> kernels;
    std::int64_t C;
    bool shortcut;
    Wanted wanted;
    Tap* weight_flip;
    A *ln_weight, *ln_bias;
    Partials<A> partials;

    // One worker's memory; W_ is W rounded up to whole tiles.
    struct Scratch {
        Ring<Tap> du;
        A* xhat;   // [S][W][Cp]
        A* slope;  // [S][W][Cp]: GELU'(h)
        A* dg;     // [S][W][Cp]: rstd e [+ du], the part of dg that needs no sum over channels
        Tap* z;    // [S][W_][L], zero from W on
        A* dz;     // [S][W][L]
        A* sum_e;  // [S][W][L]: lane l has the channels that are l modulo L
        A* sum_ex;
    };

    static NestedConvBwdRows plan(std::int64_t H, std::int64_t W, std::int64_t C, int K,
                                  bool shortcut, Wanted wanted) {
        NestedConvBwdRows r{
            RowStep<Tap>::plan(H, W, C, K), {}, C, shortcut, wanted, {}, {}, {}, {}};
        row_kernels(K, &r.kernels);
        return r;
    }

    void take_parameters(Carver& carver, std::int64_t chunks) {
        const int taps = step.K * step.K;
        weight_flip = carver.take<Tap>(step.blocks * tap_elements<Tap>(step.K));
        ln_weight = carver.take<A>(step.channels);
        ln_bias = carver.take<A>(step.channels);
        partials = Partials<A>::take(carver, chunks, C, taps);
    }
    void copy_parameters(const void* weight, const void* bias) const {
        copy_parameter(weight, A(1), C, ln_weight);
        copy_parameter(bias, A(0), C, ln_bias);
    }
    WeightCopy<Tap> weight_copy(const void* conv_weight) const {
        return {static_cast<const A*>(conv_weight), weight_flip, C, step.K, true};
    }

    Scratch take_scratch(Carver& carver) const {
        Scratch s;
        const std::int64_t pixels = step.rows * step.W;
        s.du = step.take_ring(carver);
        s.xhat = carver.take<A>(pixels * step.pixel);
        s.slope = carver.take<A>(pixels * step.pixel);
        s.dg = carver.take<A>(pixels * step.pixel);
        s.z = carver.take<Tap>(step.in_elements(step.rows));
        s.dz = carver.take<A>(pixels * L);
        s.sum_e = carver.take<A>(pixels * L);
        s.sum_ex = carver.take<A>(pixels * L);
        return s;
    }
    void prepare(const Scratch& s) const {
        s.du.clear_padding();
        for (std::int64_t i = 0; i < step.in_elements(step.rows); ++i) s.z[i] = 0;
    }

    // Row y of du into the ring, of those from `first` on; du(x, c, lanes) is a Pack of it.
    template <class F>
    CONVNEST_INLINE_LAMBDA void enter_row(const Scratch& s, std::int64_t y, std::int64_t first,
                                          F&& du) const {
        Tap* row = s.du.row(0, y) + s.du.pad * L;
        const auto place = s.du.place(y, first);
        for (std::int64_t x = 0; x < step.W; ++x) {
            Tap* out = row + x * L;
            over_channels<A>(C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                place.put_all(out, du(x, c, lanes), s.du.block_stride);
                out += lanes.kVectors * s.du.block_stride;
            });
        }
    }

    // `count` rows from y on, up to what leave_dh finishes. h, mean and rstd are of their pixels.
    void run_rows(const Scratch& s, std::int64_t chunk, std::int64_t y, std::int64_t count,
                  const T* h, const A* mean, const A* rstd) const {
        const std::int64_t pixels = count * step.W;
        for (std::int64_t i = 0; i < pixels; ++i) {
            A* xhat = s.xhat + i * step.pixel;
            A* slope = s.slope + i * step.pixel;
            over_channels<A>(C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                const auto g = gelu_and_grad_of<T>(load_ahead(h + i * C + c, lanes));
                store_all(xhat + c, (g.value - mean[i]) * rstd[i]);
                store_all(slope + c, g.grad);
            });
        }
        for (std::int64_t i = 0; i < pixels * L; ++i) s.sum_e[i] = s.sum_ex[i] = 0;
        for (std::int64_t b = 0; b < step.blocks; ++b) run_block(s, chunk, rstd, b, y, count);
    }

    // One vector of channels of `count` rows: conv gradients, sums, and dg up to the channel means.
    void run_block(const Scratch& s, std::int64_t chunk, const A* rstd, std::int64_t b,
                   std::int64_t y, std::int64_t count) const {
        const std::int64_t c = b * L;
        const RingRows<Tap> rows(s.du, b, y, step.end_row(y + count));
        const Vec<A> gamma = load(ln_weight + c), beta = load(ln_bias + c);
        if (wanted.conv_weight) {
            for (std::int64_t r = 0; r < count; ++r) {
                const A* xhat = s.xhat + r * step.W * step.pixel + c;
                Tap* z = step.in_row(s.z, y + r, y);
                const auto place = Place<Tap>::of_row(y + r, y);
                for (std::int64_t x = 0; x < step.W; ++x) {
                    place.put(z + x * L, load(xhat + x * step.pixel) * gamma + beta);
                }
            }
            kernels.weight_rows({rows.pointers, rows.begin, rows.end, s.z,
                                 partials.weight(chunk, b), count, step.W, step.tiles, rows.odd});
        }
        if (wanted.conv_bias) {
            Vec<A> dbias = {};
            for (std::int64_t r = 0; r < count; ++r) {
                const Tap* du = s.du.row(b, y + r) + s.du.pad * L;
                const auto place = s.du.place(y + r, y);
                for (std::int64_t x = 0; x < step.W; ++x) dbias += place.get(du + x * L);
            }
            partials.add(chunk, partials.kBias, c, dbias);
        }
        if (!wanted.norm) return;
        kernels.conv_rows({rows.pointers, rows.begin, rows.end,
                           weight_flip + b * tap_elements<Tap>(step.K), s.dz, step.W * L, L, count,
                           step.W, step.tiles, rows.odd});
        Vec<A> dgamma = {}, dbeta = {};
        for (std::int64_t r = 0; r < count; ++r) {
            const Tap* du = s.du.row(b, y + r) + s.du.pad * L;
            const auto place = s.du.place(y + r, y);
            for (std::int64_t x = 0; x < step.W; ++x) {
                const std::int64_t i = r * step.W + x;
                const Vec<A> dz = load(s.dz + i * L), e = dz * gamma;
                const Vec<A> xhat = load(s.xhat + i * step.pixel + c);
                dgamma += dz * xhat;
                dbeta += dz;
                store(s.sum_e + i * L, load(s.sum_e + i * L) + e);
                store(s.sum_ex + i * L, load(s.sum_ex + i * L) + e * xhat);
                const Vec<A> dg = rstd[i] * e;
                store(s.dg + i * step.pixel + c, shortcut ? dg + place.get(du + x * L) : dg);
            }
        }
        partials.add(chunk, partials.kGamma, c, dgamma);
        partials.add(chunk, partials.kBeta, c, dbeta);
    }

    // dh of the rows that were run; leave(i, c, pack, lanes) takes it.
    template <class F>
    CONVNEST_INLINE_LAMBDA void leave_dh(const Scratch& s, const A* rstd, std::int64_t pixels,
                                         F&& leave) const {
        const A each = A(1) / static_cast<A>(C);
        for (std::int64_t i = 0; i < pixels; ++i) {
            const A scale = rstd[i] * each;
            const A mean_e = lane_sum<A>(load(s.sum_e + i * L)) * scale;
            const A mean_ex = lane_sum<A>(load(s.sum_ex + i * L)) * scale;
            const A* xhat = s.xhat + i * step.pixel;
            const A* slope = s.slope + i * step.pixel;
            const A* dg = s.dg + i * step.pixel;
            over_channels<A>(C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                const auto sum =
                    load_all(dg + c, lanes) - mean_e - load_all(xhat + c, lanes) * mean_ex;
                leave(i, c, sum * load_all(slope + c, lanes), lanes);
            });
        }
    }
};

}  // namespace
}  // namespace convnest::CONVNEST_ISA
