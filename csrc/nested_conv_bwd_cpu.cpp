// nested_conv backward, with g = GELU(h), xhat = (g - mean) rstd, z = ln_weight xhat + ln_bias:
//
//   du         = dv GELU'(u)                                dconv_bias = sum du
//   dz[y,x]    = sum_{ky,kx} w[ky,kx] du[y+p-ky, x+p-kx]
//   dw[ky,kx]  = sum_{y,x} z[y,x] du[y+p-ky, x+p-kx]
//   dln_weight = sum dz xhat                                dln_bias = sum dz
//   dg         = rstd (e - mean_c(e) - xhat mean_c(e xhat)) [+ du],   e = dz ln_weight
//   dh         = dg GELU'(h)
//
// Reads dv, u, h, mean, rstd; writes dh; sums parameter gradients into one partial per chunk.
// A chunk is a run of bands, a band some rows of one image. A band marches down with a ring of rows
// of du; only the rows that it owns of xhat and GELU'(h) are made again from h. Per vector of
// channels everything between du and dz then happens while its rows are in the L1 cache, with the
// sums over channels kept per pixel; a last pass over the pixels finishes dh.
#include "nested_conv.h"

#include "common/layernorm.h"
#include "common/parameters.h"
#include "common/partition.h"
#include "depthwise_row.h"
#include "row_step.h"

namespace convnest::CONVNEST_ISA {
namespace {

template <class T>
struct Backward {
    using A = Accumulate<T>;
    static constexpr int L = kLanes<A>;

    const NestedConvBwdParams& p;
    RowStep<A> step;
    RowKernels<A> kernels;
    std::int64_t bands, chunks;
    A *weight_flip, *ln_weight, *ln_bias;
    Partials<A> partials;

    // One worker's memory; W_ is W rounded up to whole tiles.
    struct Scratch {
        Ring<A> du;
        A* xhat;   // [S][W][Cp]
        A* slope;  // [S][W][Cp]: GELU'(h)
        A* dg;     // [S][W][Cp]: rstd e [+ du], the part of dg that needs no sum over channels
        A* z;      // [S][W_][L], zero from W on
        A* dz;     // [S][W][L]
        A* sum_e;  // [S][W][L]: lane l has the channels that are l modulo L
        A* sum_ex;
        std::size_t bytes;
    };

    Scratch carve(char* base) const {
        Carver carver(base);
        Scratch s;
        const std::int64_t pixels = step.rows * p.W;
        s.du = step.take_ring(carver);
        s.xhat = carver.take<A>(pixels * step.pixel);
        s.slope = carver.take<A>(pixels * step.pixel);
        s.dg = carver.take<A>(pixels * step.pixel);
        s.z = carver.take<A>(step.rows * step.tiles.width() * L);
        s.dz = carver.take<A>(pixels * L);
        s.sum_e = carver.take<A>(pixels * L);
        s.sum_ex = carver.take<A>(pixels * L);
        s.bytes = carver.used();
        return s;
    }

    static void prepare(char* base, void* context) {
        const Backward& f = *static_cast<const Backward*>(context);
        const Scratch s = f.carve(base);
        s.du.clear(f.step.blocks);
        for (std::int64_t i = 0; i < f.step.rows * f.step.tiles.width() * L; ++i) s.z[i] = 0;
    }

    static void run_chunk(std::int64_t chunk, char* base, void* context) {
        const Backward& f = *static_cast<const Backward*>(context);
        const Scratch s = f.carve(base);
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
            for (; entered < step.end_row(y + count); ++entered) enter_du(s, n, entered);
            const std::int64_t first = (n * p.H + y) * p.W;
            enter_centre(s, first, count * p.W);
            for (std::int64_t i = 0; i < count * p.W * L; ++i) s.sum_e[i] = s.sum_ex[i] = 0;
            for (std::int64_t b = 0; b < step.blocks; ++b) run_block(s, chunk, first, b, y, count);
            if (p.dh != nullptr) leave_dh(s, first, count * p.W);
        }
    }

    void enter_du(const Scratch& s, std::int64_t n, std::int64_t y) const {
        const std::int64_t first = (n * p.H + y) * p.W;
        A* row = s.du.row(0, y) + s.du.pad * L;
        for (std::int64_t x = 0; x < p.W; ++x) {
            const T* dv = static_cast<const T*>(p.dv) + (first + x) * p.C;
            const T* u = static_cast<const T*>(p.u) + (first + x) * p.C;
            A* du = row + x * L;
            over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                const auto slope = gelu_and_grad_of(load_as(u + c, lanes)).grad;
                store_all(du, load_as(dv + c, lanes) * slope, s.du.block_stride);
                du += lanes.kVectors * s.du.block_stride;
            });
        }
    }

    void enter_centre(const Scratch& s, std::int64_t first, std::int64_t pixels) const {
        for (std::int64_t i = 0; i < pixels; ++i) {
            const T* h = static_cast<const T*>(p.h) + (first + i) * p.C;
            const A mean = static_cast<const A*>(p.mean)[first + i];
            const A rstd = static_cast<const A*>(p.rstd)[first + i];
            A* xhat = s.xhat + i * step.pixel;
            A* slope = s.slope + i * step.pixel;
            over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                const auto g = gelu_and_grad_of(load_as(h + c, lanes));
                store_all(xhat + c, (g.value - mean) * rstd);
                store_all(slope + c, g.grad);
            });
        }
    }

    // One vector of channels of `count` rows: conv gradients, sums, and dg up to the channel means.
    void run_block(const Scratch& s, std::int64_t chunk, std::int64_t first, std::int64_t b,
                   std::int64_t y, std::int64_t count) const {
        const std::int64_t c = b * L;
        typename RowStep<A>::Rows rows;
        step.point(s.du, b, y, count, &rows);
        const Vec<A> gamma = load(ln_weight + c), beta = load(ln_bias + c);
        if (p.dconv_weight != nullptr) {
            for (std::int64_t r = 0; r < count; ++r) {
                const A* xhat = s.xhat + r * p.W * step.pixel + c;
                A* z = s.z + r * step.tiles.width() * L;
                for (std::int64_t x = 0; x < p.W; ++x) {
                    store(z + x * L, load(xhat + x * step.pixel) * gamma + beta);
                }
            }
            kernels.weight_rows({rows.pointers, rows.begin, rows.end, s.z,
                                 partials.weight(chunk, b), count, p.W, step.tiles});
        }
        if (p.dconv_bias != nullptr) {
            Vec<A> dbias = {};
            for (std::int64_t r = 0; r < count; ++r) {
                const A* du = rows.pointers[r + p.K / 2] + s.du.pad * L;
                for (std::int64_t x = 0; x < p.W; ++x) dbias += load(du + x * L);
            }
            partials.add(chunk, partials.kBias, c, dbias);
        }
        if (p.dh == nullptr && p.dln_weight == nullptr && p.dln_bias == nullptr) return;
        kernels.conv_rows({rows.pointers, rows.begin, rows.end, weight_flip + b * p.K * p.K * L,
                           s.dz, p.W * L, L, count, p.W, step.tiles});
        const A* rstd = static_cast<const A*>(p.rstd) + first;
        Vec<A> dgamma = {}, dbeta = {};
        for (std::int64_t r = 0; r < count; ++r) {
            const A* du = rows.pointers[r + p.K / 2] + s.du.pad * L;
            for (std::int64_t x = 0; x < p.W; ++x) {
                const std::int64_t i = r * p.W + x;
                const Vec<A> dz = load(s.dz + i * L), e = dz * gamma;
                const Vec<A> xhat = load(s.xhat + i * step.pixel + c);
                dgamma += dz * xhat;
                dbeta += dz;
                store(s.sum_e + i * L, load(s.sum_e + i * L) + e);
                store(s.sum_ex + i * L, load(s.sum_ex + i * L) + e * xhat);
                const Vec<A> dg = rstd[i] * e;
                store(s.dg + i * step.pixel + c, p.shortcut ? dg + load(du + x * L) : dg);
            }
        }
        partials.add(chunk, partials.kGamma, c, dgamma);
        partials.add(chunk, partials.kBeta, c, dbeta);
    }

    void leave_dh(const Scratch& s, std::int64_t first, std::int64_t pixels) const {
        const A each = A(1) / static_cast<A>(p.C);
        for (std::int64_t i = 0; i < pixels; ++i) {
            const A scale = static_cast<const A*>(p.rstd)[first + i] * each;
            const A mean_e = lane_sum<A>(load(s.sum_e + i * L)) * scale;
            const A mean_ex = lane_sum<A>(load(s.sum_ex + i * L)) * scale;
            const A* xhat = s.xhat + i * step.pixel;
            const A* slope = s.slope + i * step.pixel;
            const A* dg = s.dg + i * step.pixel;
            T* dh = static_cast<T*>(p.dh) + (first + i) * p.C;
            over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                const auto sum =
                    load_all(dg + c, lanes) - mean_e - load_all(xhat + c, lanes) * mean_ex;
                store_as(dh + c, sum * load_all(slope + c, lanes), lanes);
            });
        }
    }
};

template <class T>
void backward(const NestedConvBwdParams& p) {
    using A = Accumulate<T>;
    const int taps = p.K * p.K;
    Backward<T> f{p, RowStep<A>::plan(p.H, p.W, p.C, p.K), {}, 0, 0, {}, {}, {}, {}};
    row_kernels(p.K, &f.kernels);
    f.bands = backward_bands(p.N, p.H, p.K);
    f.chunks = chunk_count(p.N * f.bands, Partials<A>::bytes(p.C, taps));
    const auto carve = [&](char* base) {
        Carver carver(base);
        f.weight_flip = carver.take<A>(f.step.channels * taps);
        f.ln_weight = carver.take<A>(f.step.channels);
        f.ln_bias = carver.take<A>(f.step.channels);
        f.partials = Partials<A>::take(carver, f.chunks, p.C, taps);
        return carver.used();
    };
    const CallScratch memory(carve(nullptr));
    carve(memory.data());
    copy_parameter(p.ln_weight, A(1), p.C, f.ln_weight);
    copy_parameter(p.ln_bias, A(0), p.C, f.ln_bias);
    WeightCopy<A>{static_cast<const A*>(p.conv_weight), f.weight_flip, p.C, taps, true}.run();
    run_units({f.chunks, f.carve(nullptr).bytes, f.prepare, f.run_chunk, &f});
    f.partials.sum(p.dconv_weight, p.dconv_bias, p.dln_weight, p.dln_bias);
}

}  // namespace

void nested_conv_backward(const NestedConvBwdParams& p) {
    switch (p.dtype) {
        case DType::kFloat32: return backward<float>(p);
        case DType::kFloat64: return backward<double>(p);
        case DType::kBFloat16: return backward<BFloat16>(p);
        case DType::kFloat16: return backward<Float16>(p);
    }
}

}  // namespace convnest::CONVNEST_ISA
