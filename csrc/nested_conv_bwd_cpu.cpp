// nested_conv backward; the formulas are in nested_conv_bwd_rows.h.
//
// Reads dv, u, h, mean, rstd; writes dh; sums parameter gradients into one partial per chunk.
// A chunk is a run of bands, a band some rows of one image.
#include "nested_conv.h"

#include "common/call.h"
#include "common/partition.h"
#include "nested_conv_bwd_rows.h"

namespace convnest::CONVNEST_ISA {
namespace {

template <class T>
struct Backward {
    using A = Accumulate<T>;

    const NestedConvBwdParams& p;
    NestedConvBwdRows<T> rows;
    std::int64_t bands, chunks;

    static void prepare(char* base, void* context) {
        const Backward& f = *static_cast<const Backward*>(context);
        Carver carver(base);
        f.rows.prepare(f.rows.take_scratch(carver));
    }

    static void run_chunk(std::int64_t chunk, char* base, void* context) {
        const Backward& f = *static_cast<const Backward*>(context);
        Carver carver(base);
        const auto s = f.rows.take_scratch(carver);
        f.rows.partials.clear(chunk);
        const Range units = part_of(f.p.N * f.bands, f.chunks, chunk);
        for (std::int64_t unit = units.begin; unit < units.end; ++unit) f.run_band(s, unit, chunk);
    }

    void run_band(const typename NestedConvBwdRows<T>::Scratch& s, std::int64_t unit,
                  std::int64_t chunk) const {
        const auto& step = rows.step;
        const std::int64_t n = unit / bands;
        const Range band = part_of(p.H, bands, unit % bands);
        const std::int64_t first_row = step.first_row(band.begin);
        std::int64_t entered = first_row;
        for (std::int64_t y = band.begin, count; y < band.end; y += count) {
            count = step.count(y, band.end);
            for (; entered < step.end_row(y + count); ++entered) {
                const std::int64_t row = (n * p.H + entered) * p.W * p.C;
                const T *dv = static_cast<const T*>(p.dv) + row,
                        *u = static_cast<const T*>(p.u) + row;
                rows.enter_row(
                    s, entered, first_row,
                    [&](std::int64_t x, std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                        const auto slope =
                            gelu_and_grad_of<T>(load_ahead(u + x * p.C + c, lanes)).grad;
                        return load_ahead(dv + x * p.C + c, lanes) * slope;
                    });
            }
            const std::int64_t first = (n * p.H + y) * p.W, pixels = count * p.W;
            const A* rstd = static_cast<const A*>(p.rstd) + first;
            rows.run_rows(s, chunk, y, count, static_cast<const T*>(p.h) + first * p.C,
                          static_cast<const A*>(p.mean) + first, rstd);
            if (p.dh == nullptr) continue;
            T* dh = static_cast<T*>(p.dh) + first * p.C;
            rows.leave_dh(s, rstd, pixels,
                          [&](std::int64_t i, std::int64_t c, const auto& value, auto lanes)
                              CONVNEST_INLINE_LAMBDA { store_as(dh + i * p.C + c, value, lanes); });
        }
    }
};

template <class T>
void backward(const NestedConvBwdParams& p) {
    using A = Accumulate<T>;
    const std::int64_t bands = backward_bands(p.N, p.H, p.K);
    const bool norm = p.dh != nullptr || p.dln_weight != nullptr || p.dln_bias != nullptr;
    Backward<T> f{
        p,
        NestedConvBwdRows<T>::plan(p.H, p.W, p.C, p.K, p.shortcut,
                                   {p.dconv_weight != nullptr, p.dconv_bias != nullptr, norm}),
        bands, chunk_count(p.N * bands, Partials<A>::bytes(p.C, p.K * p.K))};
    const CarvedScratch memory([&](Carver& carver) { f.rows.take_parameters(carver, f.chunks); });
    f.rows.copy_parameters(p.ln_weight, p.ln_bias);
    auto copy = f.rows.weight_copy(p.conv_weight);
    auto sum = f.rows.partials.sum_into(p.dconv_weight, p.dconv_bias, p.dln_weight, p.dln_bias);
    const std::size_t scratch = bytes_of([&](Carver& carver) { f.rows.take_scratch(carver); });
    run_phases({copy.units(), {f.chunks, scratch, f.prepare, f.run_chunk, &f}, sum.units()});
}

}  // namespace

void nested_conv_backward(const NestedConvBwdParams& p) {
    with_type(p.dtype, [&](auto type) { backward<typename decltype(type)::type>(p); });
}

}  // namespace convnest::CONVNEST_ISA
