// dwconv_gelu_layernorm backward, with xhat = (a - mean) rstd of the norm's input a:
//
//   act, then norm (a = act(c)):  e = dy;                               dc = act'(c) da
//   norm first     (a = c):       e = dy act'(ln_weight xhat + ln_bias);  dc = da
//   da         = rstd (f - mean_c(f) - xhat mean_c(f xhat)),  f = e ln_weight
//   dln_weight = sum e xhat;  dln_bias = sum e;  dconv_bias = sum dc
//   dx[y,x]    = sum_{ky,kx} w[ky,kx] dc[y+p-ky, x+p-kx]
//   dw[ky,kx]  = sum_{y,x} x[y,x] dc[y+p-ky, x+p-kx]
//
// Reads dy, c, x, mean, rstd; writes dx; sums parameter gradients into one partial per chunk.
// A chunk is a run of bands, a band some rows of one image. A band marches down with a ring of rows
// of dc, made pixel by pixel as they enter; then, per vector of channels, both gradients of the
// convolution come from the same ring, and from x.
#include <initializer_list>

#include "act_norm_rows.h"
#include "common/call.h"
#include "common/parameters.h"
#include "common/partition.h"
#include "depthwise_row.h"
#include "dwconv_gelu_layernorm.h"
#include "row_step.h"

namespace convnest::CONVNEST_ISA {
namespace {

template <class T>
struct Backward {
    using A = Accumulate<T>;
    using Tap = typename TapOf<T>::type;
    static constexpr int L = kLanes<A>;

    const DwconvGeluLayernormBwdParams& p;
    RowStep<Tap> step;
    RowKernels<Tap> kernels;
    std::int64_t bands, chunks;
    Tap* weight_flip;
    ActNorm<T> act_norm;
    Partials<A> partials;

    // One worker's memory; W_ is W rounded up to whole tiles.
    struct Scratch {
        Ring<Tap> dc;
        Tap* x;  // [S][W_][L] of one block, zero from W on
        A* dx;   // [S][W][Cp]
        typename ActNorm<T>::Scratch act_norm;
    };

    Scratch take_scratch(Carver& carver) const {
        Scratch s;
        s.dc = step.take_ring(carver);
        s.x = carver.take<Tap>(step.in_elements(step.rows));
        s.dx = carver.take<A>(step.rows * p.W * step.pixel);
        s.act_norm = act_norm.take_scratch(carver);
        return s;
    }

    static void prepare(char* base, void* context) {
        const Backward& f = *static_cast<const Backward*>(context);
        Carver carver(base);
        const Scratch s = f.take_scratch(carver);
        s.dc.clear_padding();
        for (std::int64_t i = 0; i < f.step.in_elements(f.step.rows); ++i) s.x[i] = 0;
    }

    static void run_chunk(std::int64_t chunk, char* base, void* context) {
        const Backward& f = *static_cast<const Backward*>(context);
        Carver carver(base);
        const Scratch s = f.take_scratch(carver);
        f.partials.clear(chunk);
        const Range units = part_of(f.p.N * f.bands, f.chunks, chunk);
        for (std::int64_t unit = units.begin; unit < units.end; ++unit) f.run_band(s, unit, chunk);
    }

    void run_band(const Scratch& s, std::int64_t unit, std::int64_t chunk) const {
        const std::int64_t n = unit / bands;
        const Range band = part_of(p.H, bands, unit % bands);
        const std::int64_t first = step.first_row(band.begin);
        std::int64_t entered = first;
        for (std::int64_t y = band.begin, count; y < band.end; y += count) {
            count = step.count(y, band.end);
            // Rows of this band and of its neighbours apart: parameters' gradients are of its own.
            for (const std::int64_t end : {band.begin, band.end, p.H}) {
                const std::int64_t last =
                    step.end_row(y + count) < end ? step.end_row(y + count) : end;
                if (last <= entered) continue;
                enter_dc(s, n, entered, last - entered, first,
                         static_cast<const T*>(p.x) + (n * p.H + y) * p.W * p.C);
                entered = last;
                if (end != band.end) continue;
                partials.add_row(chunk, partials.kGamma, s.act_norm.dgamma);
                partials.add_row(chunk, partials.kBeta, s.act_norm.dbeta);
            }
            for (std::int64_t b = 0; b < step.blocks; ++b) run_block(s, chunk, n, b, y, count);
            if (p.dx != nullptr) leave_dx(s, (n * p.H + y) * p.W, count * p.W);
        }
    }

    // Rows of dc into the ring, of those from `first_row` on. `x` is the image that run_block walks
    // next: it is asked for here, where there is arithmetic to wait beside.
    struct Target {
        Tap* dc;
        Place<Tap> place;
        std::int64_t x;  // its offset
    };
    void enter_dc(const Scratch& s, std::int64_t n, std::int64_t y, std::int64_t count,
                  std::int64_t first_row, const T* x) const {
        const std::int64_t first = (n * p.H + y) * p.W;
        act_norm.backward(
            s.act_norm, count * p.W, static_cast<const T*>(p.dy) + first * p.C,
            static_cast<const T*>(p.c) + first * p.C, static_cast<const A*>(p.mean) + first,
            static_cast<const A*>(p.rstd) + first,
            [&](std::int64_t i) CONVNEST_INLINE_LAMBDA {
                const std::int64_t row = i / p.W;
                return Target{s.dc.row(0, y + row) + (s.dc.pad + i - row * p.W) * L,
                              s.dc.place(y + row, first_row), i * p.C};
            },
            [&](const Target& to, std::int64_t c, const auto& value, auto lanes)
                CONVNEST_INLINE_LAMBDA {
                    ask_for(x, to.x + c, lanes);
                    to.place.put_all(to.dc + c / L * s.dc.block_stride, zero_others(value, lanes),
                                     s.dc.block_stride);
                });
    }

    // Both conv gradients of one vector of channels, and the sum of its dc.
    void run_block(const Scratch& s, std::int64_t chunk, std::int64_t n, std::int64_t b,
                   std::int64_t y, std::int64_t count) const {
        const RingRows<Tap> rows(s.dc, b, y, step.end_row(y + count));
        if (p.dx != nullptr) {
            kernels.conv_rows({rows.pointers, rows.begin, rows.end,
                               weight_flip + b * tap_elements<Tap>(p.K), s.dx + b * L,
                               p.W * step.pixel, step.pixel, count, p.W, step.tiles, rows.odd});
        }
        if (p.dconv_weight != nullptr) {
            for (std::int64_t r = 0; r < count; ++r) {
                Tap* x = step.in_row(s.x, y + r, y);
                const auto place = Place<Tap>::of_row(y + r, y);
                step.copy_row(static_cast<const T*>(p.x), n, y + r, b, p.C,
                              [&](std::int64_t i, Vec<A> value)
                                  CONVNEST_INLINE_LAMBDA { place.put(x + i * L, value); });
            }
            kernels.weight_rows({rows.pointers, rows.begin, rows.end, s.x,
                                 partials.weight(chunk, b), count, p.W, step.tiles, rows.odd});
        }
        if (p.dconv_bias == nullptr) return;
        Vec<A> dbias = {};
        for (std::int64_t r = 0; r < count; ++r) {
            const Tap* dc = s.dc.row(b, y + r) + s.dc.pad * L;
            const auto place = s.dc.place(y + r, y);
            for (std::int64_t x = 0; x < p.W; ++x) dbias += place.get(dc + x * L);
        }
        partials.add(chunk, partials.kBias, b * L, dbias);
    }

    void leave_dx(const Scratch& s, std::int64_t first, std::int64_t pixels) const {
        for (std::int64_t i = 0; i < pixels; ++i) {
            const A* in = s.dx + i * step.pixel;
            T* dx = static_cast<T*>(p.dx) + (first + i) * p.C;
            over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                store_as(dx + c, load_all(in + c, lanes), lanes);
            });
        }
    }
};

template <class T>
void backward(const DwconvGeluLayernormBwdParams& p) {
    using A = Accumulate<T>;
    using Tap = typename TapOf<T>::type;
    const int taps = p.K * p.K;
    Backward<T> f{p,  RowStep<Tap>::plan(p.H, p.W, p.C, p.K), {}, 0, 0,
                  {}, {p.C, p.gelu, p.norm_first, {}, {}},    {}};
    row_kernels(p.K, &f.kernels);
    f.bands = backward_bands(p.N, p.H, p.K);
    f.chunks = chunk_count(p.N * f.bands, Partials<A>::bytes(p.C, taps));
    const CarvedScratch memory([&](Carver& carver) {
        f.weight_flip = carver.take<Tap>(f.step.blocks * tap_elements<Tap>(p.K));
        f.act_norm.take(carver);
        f.partials = Partials<A>::take(carver, f.chunks, p.C, taps);
    });
    f.act_norm.copy(p.ln_weight, p.ln_bias);
    WeightCopy<Tap> copy{static_cast<const A*>(p.conv_weight), f.weight_flip, p.C, p.K, true};
    auto sum = f.partials.sum_into(p.dconv_weight, p.dconv_bias, p.dln_weight, p.dln_bias);
    const std::size_t scratch = bytes_of([&](Carver& carver) { f.take_scratch(carver); });
    run_phases({copy.units(), {f.chunks, scratch, f.prepare, f.run_chunk, &f}, sum.units()});
}

}  // namespace

void dwconv_gelu_layernorm_backward(const DwconvGeluLayernormBwdParams& p) {
    with_type(p.dtype, [&](auto type) { backward<typename decltype(type)::type>(p); });
}

}  // namespace convnest::CONVNEST_ISA
