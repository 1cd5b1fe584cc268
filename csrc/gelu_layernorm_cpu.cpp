// gelu_layernorm, forward and backward; the formulas are in act_norm_rows.h.
//
// Forward reads x; writes y, and where they are kept mean and rstd. Backward reads dy, x, mean,
// rstd; writes dx, and sums parameter gradients over kRowsPerSum rows, and those sums into one
// partial per chunk of rows.
#include "gelu_layernorm.h"

#include "act_norm_rows.h"
#include "common/call.h"
#include "common/partition.h"

namespace convnest::CONVNEST_ISA {
namespace {

template <class T>
struct Forward {
    using A = Accumulate<T>;

    const GeluLayernormFwdParams& p;
    std::int64_t units;
    ActNorm<T> act_norm;

    static std::size_t scratch_bytes(std::int64_t C) {
        return 2 * padded_channels<A>(C) * sizeof(A);
    }

    static void run_unit(std::int64_t unit, char* base, void* context) {
        const Forward& f = *static_cast<const Forward*>(context);
        const std::int64_t C = f.p.C, padded = padded_channels<A>(C);
        const Range rows = part_of(f.p.rows, f.units, unit);
        A* values = reinterpret_cast<A*>(base);
        const T* x = static_cast<const T*>(f.p.x) + rows.begin * C;
        A *mean = static_cast<A*>(f.p.mean), *rstd = static_cast<A*>(f.p.rstd);
        f.act_norm.forward(
            rows.end - rows.begin, f.p.eps,
            [&](std::int64_t i, std::int64_t c, auto lanes)
                CONVNEST_INLINE_LAMBDA { return load_ahead(x + i * C + c, lanes); },
            [&](std::int64_t i) CONVNEST_INLINE_LAMBDA { return values + (i & 1) * padded; },
            static_cast<T*>(f.p.y) + rows.begin * C, mean == nullptr ? mean : mean + rows.begin,
            rstd == nullptr ? rstd : rstd + rows.begin);
    }
};

template <class T>
struct Backward {
    using A = Accumulate<T>;

    const GeluLayernormBwdParams& p;
    std::int64_t chunks;
    ActNorm<T> act_norm;
    Partials<A> partials;

    static void run_chunk(std::int64_t chunk, char* base, void* context) {
        const Backward& f = *static_cast<const Backward*>(context);
        Carver carver(base);
        const auto s = f.act_norm.take_scratch(carver);
        f.partials.clear(chunk);
        const Range rows = part_of(f.p.rows, f.chunks, chunk);
        for (std::int64_t row = rows.begin; row < rows.end; row += kRowsPerSum) {
            const std::int64_t left = rows.end - row;
            f.run_rows(row, left < kRowsPerSum ? left : kRowsPerSum, s);
            f.partials.add_row(chunk, f.partials.kGamma, s.dgamma);
            f.partials.add_row(chunk, f.partials.kBeta, s.dbeta);
        }
    }

    void run_rows(std::int64_t first, std::int64_t count,
                  const typename ActNorm<T>::Scratch& s) const {
        T* dx = p.dx == nullptr ? nullptr : static_cast<T*>(p.dx) + first * p.C;
        act_norm.backward(
            s, count, static_cast<const T*>(p.dy) + first * p.C,
            static_cast<const T*>(p.x) + first * p.C, static_cast<const A*>(p.mean) + first,
            static_cast<const A*>(p.rstd) + first,
            [&](std::int64_t i)
                CONVNEST_INLINE_LAMBDA { return dx == nullptr ? dx : dx + i * p.C; },
            [&](T* row, std::int64_t c, const auto& value, auto lanes) CONVNEST_INLINE_LAMBDA {
                if (row != nullptr) store_as(row + c, value, lanes);
            });
    }
};

template <class T>
void forward(const GeluLayernormFwdParams& p) {
    Forward<T> f{p, row_units(p.rows, p.C), {p.C, true, p.norm_first, {}, {}}};
    const CarvedScratch memory([&](Carver& carver) { f.act_norm.take(carver); });
    f.act_norm.copy(p.ln_weight, p.ln_bias);
    run_units({f.units, f.scratch_bytes(p.C), nullptr, f.run_unit, &f});
}

template <class T>
void backward(const GeluLayernormBwdParams& p) {
    using A = Accumulate<T>;
    const std::int64_t chunks = chunk_count(row_units(p.rows, p.C), Partials<A>::bytes(p.C, 0));
    Backward<T> f{p, chunks, {p.C, true, p.norm_first, {}, {}}, {}};
    const CarvedScratch memory([&](Carver& carver) {
        f.act_norm.take(carver);
        f.partials = Partials<A>::take(carver, chunks, p.C, 0);
    });
    f.act_norm.copy(p.ln_weight, p.ln_bias);
    const std::size_t scratch = bytes_of([&](Carver& carver) { f.act_norm.take_scratch(carver); });
    auto sum = f.partials.sum_into(nullptr, nullptr, p.dln_weight, p.dln_bias);
    run_phases({{chunks, scratch, nullptr, f.run_chunk, &f}, sum.units()});
}

}  // namespace

void gelu_layernorm_forward(const GeluLayernormFwdParams& p) {
    with_type(p.dtype, [&](auto type) { forward<typename decltype(type)::type>(p); });
}

void gelu_layernorm_backward(const GeluLayernormBwdParams& p) {
    with_type(p.dtype, [&](auto type) { backward<typename decltype(type)::type>(p); });
}

}  // namespace convnest::CONVNEST_ISA
