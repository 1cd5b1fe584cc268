// layernorm_residual, with xhat = (t - mean) rstd:
//
//   y = scale x + ln_weight xhat + ln_bias
// backward:
//   dt = rstd (f - mean_c(f) - xhat mean_c(f xhat)),  f = dy ln_weight;    dx = scale dy
//   dln_weight = sum dy xhat;  dln_bias = sum dy;  dscale = sum dy x
//
// One row at a time, in cache from its first pass to its last. Backward sums parameter gradients
// over kRowsPerSum rows, and those sums into one partial per chunk of rows.
#include "layernorm_residual.h"

#include "common/call.h"
#include "common/layernorm.h"
#include "common/parameters.h"
#include "common/partition.h"

namespace convnest::CONVNEST_ISA {
namespace {

template <class T>
struct Forward {
    using A = Accumulate<T>;

    const LayernormResidualFwdParams& p;
    std::int64_t units;
    A *ln_weight, *ln_bias, *scale;

    static void run_unit(std::int64_t unit, char* base, void* context) {
        const Forward& f = *static_cast<const Forward*>(context);
        const Range rows = part_of(f.p.rows, f.units, unit);
        for (std::int64_t row = rows.begin; row < rows.end; ++row) {
            f.run_row(row, reinterpret_cast<A*>(base));
        }
    }

    void run_row(std::int64_t row, A* values) const {
        const T* t = static_cast<const T*>(p.t) + row * p.C;
        const T* x = static_cast<const T*>(p.x) + row * p.C;
        T* y = static_cast<T*>(p.y) + row * p.C;
        ChannelSum<A> sum;
        over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
            const auto value = load_as(t + c, lanes);
            store_all(values + c, value);
            sum.add(value);
        });
        const auto stats = row_statistics(values, p.C, sum.total(), static_cast<A>(p.eps));
        over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
            const auto xhat = (load_all(values + c, lanes) - stats.mean) * stats.rstd;
            const auto norm = xhat * load_all(ln_weight + c, lanes) + load_all(ln_bias + c, lanes);
            store_as(y + c, load_as(x + c, lanes) * load_all(scale + c, lanes) + norm, lanes);
        });
        if (p.mean != nullptr) static_cast<A*>(p.mean)[row] = stats.mean;
        if (p.rstd != nullptr) static_cast<A*>(p.rstd)[row] = stats.rstd;
    }
};

template <class T>
struct Backward {
    using A = Accumulate<T>;

    const LayernormResidualBwdParams& p;
    std::int64_t chunks;
    A *ln_weight, *scale;
    Partials<A> partials;  // kBias holds dscale

    // One worker's memory, all [Cp].
    struct Scratch {
        A *xhat, *f, *dgamma, *dbeta, *dscale;
    };

    Scratch take_scratch(Carver& carver) const {
        Scratch s;
        for (A** at : {&s.xhat, &s.f, &s.dgamma, &s.dbeta, &s.dscale}) {
            *at = carver.take<A>(padded_channels<A>(p.C));
        }
        return s;
    }

    static void run_chunk(std::int64_t chunk, char* base, void* context) {
        const Backward& f = *static_cast<const Backward*>(context);
        Carver carver(base);
        const Scratch s = f.take_scratch(carver);
        f.partials.clear(chunk);
        const Range rows = part_of(f.p.rows, f.chunks, chunk);
        for (std::int64_t row = rows.begin; row < rows.end; row += kRowsPerSum) {
            const std::int64_t end = row + kRowsPerSum < rows.end ? row + kRowsPerSum : rows.end;
            for (std::int64_t c = 0; c < padded_channels<A>(f.p.C); ++c) {
                s.dgamma[c] = s.dbeta[c] = s.dscale[c] = 0;
            }
            for (std::int64_t r = row; r < end; ++r) f.run_row(r, s);
            f.partials.add_row(chunk, f.partials.kGamma, s.dgamma);
            f.partials.add_row(chunk, f.partials.kBeta, s.dbeta);
            f.partials.add_row(chunk, f.partials.kBias, s.dscale);
        }
    }

    void run_row(std::int64_t row, const Scratch& s) const {
        const T* dy = static_cast<const T*>(p.dy) + row * p.C;
        const T* t = static_cast<const T*>(p.t) + row * p.C;
        const T* x = p.dscale == nullptr ? nullptr : static_cast<const T*>(p.x) + row * p.C;
        T* dx = p.dx == nullptr ? nullptr : static_cast<T*>(p.dx) + row * p.C;
        const A mean = static_cast<const A*>(p.mean)[row],
                rstd = static_cast<const A*>(p.rstd)[row];
        ChannelSum<A> sum_f, sum_fx;
        over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
            const auto e = load_as(dy + c, lanes);
            const auto xhat = (load_as(t + c, lanes) - mean) * rstd;
            const auto f = e * load_all(ln_weight + c, lanes);
            store_all(s.xhat + c, xhat);
            store_all(s.f + c, f);
            store_all(s.dgamma + c, load_all(s.dgamma + c, lanes) + e * xhat);
            store_all(s.dbeta + c, load_all(s.dbeta + c, lanes) + e);
            if (x != nullptr) {
                store_all(s.dscale + c, load_all(s.dscale + c, lanes) + e * load_as(x + c, lanes));
            }
            if (dx != nullptr) store_as(dx + c, e * load_all(scale + c, lanes), lanes);
            sum_f.add(f);
            sum_fx.add(f * xhat);
        });
        if (p.dt == nullptr) return;
        const NormGradient<A> norm{rstd, sum_f.total() / static_cast<A>(p.C),
                                   sum_fx.total() / static_cast<A>(p.C)};
        T* dt = static_cast<T*>(p.dt) + row * p.C;
        over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
            store_as(dt + c, norm(load_all(s.f + c, lanes), load_all(s.xhat + c, lanes)), lanes);
        });
    }
};

template <class T>
void forward(const LayernormResidualFwdParams& p) {
    using A = Accumulate<T>;
    const std::int64_t channels = padded_channels<A>(p.C);
    Forward<T> f{p, row_units(p.rows, p.C), {}, {}, {}};
    const CarvedScratch memory([&](Carver& carver) {
        for (A** at : {&f.ln_weight, &f.ln_bias, &f.scale}) *at = carver.take<A>(channels);
    });
    copy_parameter(p.ln_weight, A(1), p.C, f.ln_weight);
    copy_parameter(p.ln_bias, A(0), p.C, f.ln_bias);
    copy_parameter(p.scale, A(1), p.C, f.scale);
    run_units({f.units, channels * sizeof(A), nullptr, f.run_unit, &f});
}

template <class T>
void backward(const LayernormResidualBwdParams& p) {
    using A = Accumulate<T>;
    const std::int64_t chunks = chunk_count(row_units(p.rows, p.C), Partials<A>::bytes(p.C, 0));
    Backward<T> f{p, chunks, {}, {}, {}};
    const CarvedScratch memory([&](Carver& carver) {
        f.ln_weight = carver.take<A>(padded_channels<A>(p.C));
        f.scale = carver.take<A>(padded_channels<A>(p.C));
        f.partials = Partials<A>::take(carver, chunks, p.C, 0);
    });
    copy_parameter(p.ln_weight, A(1), p.C, f.ln_weight);
    copy_parameter(p.scale, A(1), p.C, f.scale);
    const std::size_t scratch = bytes_of([&](Carver& carver) { f.take_scratch(carver); });
    auto sum = f.partials.sum_into(nullptr, p.dscale, p.dln_weight, p.dln_bias);
    run_phases({{chunks, scratch, nullptr, f.run_chunk, &f}, sum.units()});
}

}  // namespace

void layernorm_residual_forward(const LayernormResidualFwdParams& p) {
    with_type(p.dtype, [&](auto type) { forward<typename decltype(type)::type>(p); });
}

void layernorm_residual_backward(const LayernormResidualBwdParams& p) {
    with_type(p.dtype, [&](auto type) { backward<typename decltype(type)::type>(p); });
}

}  // namespace convnest::CONVNEST_ISA
