// nested_conv forward:  g = GELU(h);  z = LN(g);  u = [g +] DW(z) + conv_bias;  v = GELU(u)
//
// Reads h; writes v, and where they are kept u, mean, rstd.
// A unit is a band of rows of one image. It marches down, a few rows a step (nested_conv_rows.h).
// All global memory is read and written in order.
#include "nested_conv.h"

#include "common/call.h"
#include "common/partition.h"
#include "nested_conv_rows.h"

namespace convnest::CONVNEST_ISA {
namespace {

template <class T>
struct Forward {
    using A = Accumulate<T>;

    const NestedConvFwdParams& p;
    NestedConvRows<T> rows;
    std::int64_t bands;

    static void prepare(char* base, void* context) {
        const Forward& f = *static_cast<const Forward*>(context);
        Carver carver(base);
        f.rows.take_scratch(carver).z.clear_padding();
    }

    static void run_unit(std::int64_t unit, char* base, void* context) {
        const Forward& f = *static_cast<const Forward*>(context);
        const auto& step = f.rows.step;
        Carver carver(base);
        const auto s = f.rows.take_scratch(carver);
        const std::int64_t n = unit / f.bands;
        const Range band = part_of(f.p.H, f.bands, unit % f.bands);
        std::int64_t entered = step.first_row(band.begin);
        for (std::int64_t y = band.begin, count; y < band.end; y += count) {
            count = step.count(y, band.end);
            for (; entered < step.end_row(y + count); ++entered) f.enter_row(s, n, entered, band);
            f.rows.convolve(s, y, count);
            for (std::int64_t r = 0; r < count; ++r) f.leave_row(s, n, y + r, r);
        }
    }

    void enter_row(const typename NestedConvRows<T>::Scratch& s, std::int64_t n, std::int64_t y,
                   Range band) const {
        const bool owned = y >= band.begin && y < band.end;
        const std::int64_t first = (n * p.H + y) * p.W;
        const T* h_row = static_cast<const T*>(p.h) + first * p.C;
        A* mean = owned && p.mean != nullptr ? static_cast<A*>(p.mean) + first : nullptr;
        A* rstd = owned && p.rstd != nullptr ? static_cast<A*>(p.rstd) + first : nullptr;
        rows.enter_row(s, y, rows.step.first_row(band.begin), mean, rstd,
                       [&](std::int64_t x, std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                           return gelu_of<T>(load_ahead(h_row + x * p.C + c, lanes));
                       });
    }

    void leave_row(const typename NestedConvRows<T>::Scratch& s, std::int64_t n, std::int64_t y,
                   std::int64_t r) const {
        const std::int64_t first = (n * p.H + y) * p.W;
        T* v_row = static_cast<T*>(p.v) + first * p.C;
        T* u_row = p.u == nullptr ? nullptr : static_cast<T*>(p.u) + first * p.C;
        rows.leave_row(s, y, r, u_row,
                       [&](std::int64_t x, std::int64_t c, const auto& value, auto lanes)
                           CONVNEST_INLINE_LAMBDA { store_as(v_row + x * p.C + c, value, lanes); });
    }
};

template <class T>
void forward(const NestedConvFwdParams& p) {
    Forward<T> f{p, NestedConvRows<T>::plan(p.H, p.W, p.C, p.K, p.eps, p.shortcut),
                 forward_bands(p.N, p.H, p.K, num_threads())};
    const CarvedScratch memory([&](Carver& carver) {
        f.rows.take_weights(carver);
        f.rows.take_vectors(carver);
    });
    auto copy = f.rows.weight_copy(p.conv_weight);
    f.rows.copy_vectors({p.conv_bias, p.ln_weight, p.ln_bias});
    const std::size_t scratch = bytes_of([&](Carver& carver) { f.rows.take_scratch(carver); });
    run_phases({copy.units(), {p.N * f.bands, scratch, f.prepare, f.run_unit, &f}});
}

}  // namespace

void nested_conv_forward(const NestedConvFwdParams& p) {
    with_type(p.dtype, [&](auto type) { forward<typename decltype(type)::type>(p); });
}

}  // namespace convnest::CONVNEST_ISA
