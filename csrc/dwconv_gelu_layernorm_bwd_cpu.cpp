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
// convolution come from the same ring.
#include "common/call.h"
#include "common/layernorm.h"
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
    static constexpr int L = kLanes<A>;

    const DwconvGeluLayernormBwdParams& p;
    RowStep<A> step;
    RowKernels<A> kernels;
    std::int64_t bands, chunks;
    A *weight_flip, *ln_weight, *ln_bias;
    Partials<A> partials;

    // One worker's memory; W_ is W rounded up to whole tiles.
    struct Scratch {
        Ring<A> dc;
        A* x;       // [block][S][W_][L], zero from W on
        A* dx;      // [S][W][Cp]
        A* xhat;    // [Cp], of one pixel
        A* slope;   // [Cp]: act'(c)
        A* f;       // [Cp]
        A* dgamma;  // [Cp], of one row
        A* dbeta;   // [Cp]
    };

    Scratch take_scratch(Carver& carver) const {
        Scratch s;
        s.dc = step.take_ring(carver);
        s.x = carver.take<A>(step.blocks * x_block());
        s.dx = carver.take<A>(step.rows * p.W * step.pixel);
        s.xhat = carver.take<A>(step.channels);
        s.slope = carver.take<A>(step.channels);
        s.f = carver.take<A>(step.channels);
        s.dgamma = carver.take<A>(step.channels);
        s.dbeta = carver.take<A>(step.channels);
        return s;
    }

    std::int64_t x_block() const { return (step.rows * step.tiles.width() | 1) * L; }

    static void prepare(char* base, void* context) {
        const Backward& f = *static_cast<const Backward*>(context);
        Carver carver(base);
        const Scratch s = f.take_scratch(carver);
        s.dc.clear(f.step.blocks);
        for (std::int64_t i = 0; i < f.step.blocks * f.x_block(); ++i) s.x[i] = 0;
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
        std::int64_t entered = step.first_row(band.begin);
        for (std::int64_t y = band.begin; y < band.end; y += step.rows) {
            const std::int64_t count = band.end - y < step.rows ? band.end - y : step.rows;
            for (; entered < step.end_row(y + count); ++entered) {
                enter_dc(s, n, entered);
                if (entered < band.begin || entered >= band.end) continue;
                partials.add_row(chunk, partials.kGamma, s.dgamma);
                partials.add_row(chunk, partials.kBeta, s.dbeta);
            }
            if (p.dconv_weight != nullptr) enter_x(s, n, y, count);
            for (std::int64_t b = 0; b < step.blocks; ++b) run_block(s, chunk, b, y, count);
            if (p.dx != nullptr) leave_dx(s, (n * p.H + y) * p.W, count * p.W);
        }
    }

    void enter_dc(const Scratch& s, std::int64_t n, std::int64_t y) const {
        const std::int64_t first = (n * p.H + y) * p.W;
        const bool gelu_before = p.gelu && !p.norm_first, gelu_after = p.gelu && p.norm_first;
        A* row = s.dc.row(0, y) + s.dc.pad * L;
        for (std::int64_t c = 0; c < step.channels; ++c) s.dgamma[c] = s.dbeta[c] = 0;
        for (std::int64_t x = 0; x < p.W; ++x) {
            const T* dy = static_cast<const T*>(p.dy) + (first + x) * p.C;
            const T* conv = static_cast<const T*>(p.c) + (first + x) * p.C;
            const A mean = static_cast<const A*>(p.mean)[first + x];
            const A rstd = static_cast<const A*>(p.rstd)[first + x];
            ChannelSum<A> sum_f, sum_fx;
            over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                auto a = load_ahead(conv + c, lanes), e = load_ahead(dy + c, lanes);
                const auto gamma = load_all(ln_weight + c, lanes);
                if (gelu_before) {
                    const auto act = gelu_and_grad_of<T>(a);
                    store_all(s.slope + c, act.grad);
                    a = act.value;
                }
                const auto xhat = (a - mean) * rstd;
                if (gelu_after)
                    e = e * gelu_and_grad_of<T>(xhat * gamma + load_all(ln_bias + c, lanes)).grad;
                const auto f = e * gamma;
                store_all(s.xhat + c, xhat);
                store_all(s.f + c, f);
                store_all(s.dgamma + c, load_all(s.dgamma + c, lanes) + e * xhat);
                store_all(s.dbeta + c, load_all(s.dbeta + c, lanes) + e);
                sum_f.add(f);
                sum_fx.add(f * xhat);
            });
            const NormGradient<A> norm{rstd, sum_f.total() / static_cast<A>(p.C),
                                       sum_fx.total() / static_cast<A>(p.C)};
            A* dc = row + x * L;
            over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                auto da = norm(load_all(s.f + c, lanes), load_all(s.xhat + c, lanes));
                if (gelu_before) da = da * load_all(s.slope + c, lanes);
                store_all(dc, zero_others(da, lanes), s.dc.block_stride);
                dc += lanes.kVectors * s.dc.block_stride;
            });
        }
    }

    void enter_x(const Scratch& s, std::int64_t n, std::int64_t y, std::int64_t count) const {
        for (std::int64_t r = 0; r < count; ++r) {
            for (std::int64_t x = 0; x < p.W; ++x) {
                const T* in = static_cast<const T*>(p.x) + ((n * p.H + y + r) * p.W + x) * p.C;
                A* out = s.x + (r * step.tiles.width() + x) * L;
                over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                    store_all(out, load_ahead(in + c, lanes), x_block());
                    out += lanes.kVectors * x_block();
                });
            }
        }
    }

    // Both conv gradients of one vector of channels, and the sum of its dc.
    void run_block(const Scratch& s, std::int64_t chunk, std::int64_t b, std::int64_t y,
                   std::int64_t count) const {
        typename RowStep<A>::Rows rows;
        step.point(s.dc, b, y, count, &rows);
        if (p.dx != nullptr) {
            kernels.conv_rows({rows.pointers, rows.begin, rows.end, weight_flip + b * p.K * p.K * L,
                               s.dx + b * L, p.W * step.pixel, step.pixel, count, p.W, step.tiles});
        }
        if (p.dconv_weight != nullptr) {
            kernels.weight_rows({rows.pointers, rows.begin, rows.end, s.x + b * x_block(),
                                 partials.weight(chunk, b), count, p.W, step.tiles});
        }
        if (p.dconv_bias == nullptr) return;
        Vec<A> dbias = {};
        for (std::int64_t r = 0; r < count; ++r) {
            const A* dc = rows.pointers[r + p.K / 2] + s.dc.pad * L;
            for (std::int64_t x = 0; x < p.W; ++x) dbias += load(dc + x * L);
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
    const int taps = p.K * p.K;
    Backward<T> f{p, RowStep<A>::plan(p.H, p.W, p.C, p.K), {}, 0, 0, {}, {}, {}, {}};
    row_kernels(p.K, &f.kernels);
    f.bands = backward_bands(p.N, p.H, p.K);
    f.chunks = chunk_count(p.N * f.bands, Partials<A>::bytes(p.C, taps));
    const CarvedScratch memory([&](Carver& carver) {
        f.weight_flip = carver.take<A>(f.step.channels * taps);
        f.ln_weight = carver.take<A>(f.step.channels);
        f.ln_bias = carver.take<A>(f.step.channels);
        f.partials = Partials<A>::take(carver, f.chunks, p.C, taps);
    });
    copy_parameter(p.ln_weight, A(1), p.C, f.ln_weight);
    copy_parameter(p.ln_bias, A(0), p.C, f.ln_bias);
    WeightCopy<A>{static_cast<const A*>(p.conv_weight), f.weight_flip, p.C, taps, true}.run();
    const std::size_t scratch = bytes_of([&](Carver& carver) { f.take_scratch(carver); });
    run_units({f.chunks, scratch, f.prepare, f.run_chunk, &f});
    f.partials.sum(p.dconv_weight, p.dconv_bias, p.dln_weight, p.dln_bias);
}

}  // namespace

void dwconv_gelu_layernorm_backward(const DwconvGeluLayernormBwdParams& p) {
    with_type(p.dtype, [&](auto type) { backward<typename decltype(type)::type>(p); });
}

}  // namespace convnest::CONVNEST_ISA
