// dwconv_gelu_layernorm forward:  c = DW(x) + conv_bias;  y = LN(act(c)), or act(LN(c)) norm first
//
// Reads x; writes y, and where they are kept c, mean, rstd.
// A unit is a band of rows of one image. It marches down, a few rows a step (a small map is one
// step): per vector of channels the input rows enter the ring in the accumulate type, and the
// convolution goes to a row buffer; then every pixel's channels, contiguous there, get bias,
// activation and norm.
#include "dwconv_gelu_layernorm.h"

#include "act_norm_rows.h"
#include "common/call.h"
#include "common/parameters.h"
#include "common/partition.h"
#include "depthwise_row.h"
#include "row_step.h"

namespace convnest::CONVNEST_ISA {
namespace {

template <class T>
struct Forward {
    using A = Accumulate<T>;
    using Tap = typename TapOf<T>::type;
    static constexpr int L = kLanes<A>;

    const DwconvGeluLayernormFwdParams& p;
    RowStep<Tap> step;
    RowKernels<Tap> kernels;
    std::int64_t bands;
    ActNorm<T> act_norm;
    Tap* weight;
    A* conv_bias;

    // One worker's memory.
    struct Scratch {
        Ring<Tap> x;
        A* conv;  // [S][W][Cp]
    };

    Scratch take_scratch(Carver& carver) const {
        Scratch s;
        s.x = step.take_ring(carver, step.rows == p.H);
        s.conv = carver.take<A>(step.rows * p.W * step.pixel);
        return s;
    }

    static void prepare(char* base, void* context) {
        const Forward& f = *static_cast<const Forward*>(context);
        Carver carver(base);
        f.take_scratch(carver).x.clear_padding();
    }

    static void run_unit(std::int64_t unit, char* base, void* context) {
        const Forward& f = *static_cast<const Forward*>(context);
        Carver carver(base);
        const Scratch s = f.take_scratch(carver);
        const std::int64_t n = unit / f.bands;
        const Range band = part_of(f.p.H, f.bands, unit % f.bands);
        const std::int64_t first = f.step.first_row(band.begin);
        std::int64_t entered = first;
        for (std::int64_t y = band.begin, count; y < band.end; y += count) {
            count = f.step.count(y, band.end);
            const std::int64_t end = f.step.end_row(y + count);
            f.step.convolve(f.kernels, s.x, f.weight, y, count, s.conv, f.p.W * f.step.pixel,
                            f.step.pixel, L, [&](std::int64_t b) CONVNEST_INLINE_LAMBDA {
                                for (std::int64_t row = entered; row < end; ++row) {
                                    f.enter_row(s, n, row, first, b);
                                }
                            });
            entered = end;
            f.leave_pixels(s.conv, (n * f.p.H + y) * f.p.W, count * f.p.W,
                           static_cast<const T*>(f.p.x) + (n * f.p.H + entered) * f.p.W * f.p.C);
        }
    }

    // A vector of channels of a row, of those from `first` on.
    CONVNEST_INLINE_LAMBDA void enter_row(const Scratch& s, std::int64_t n, std::int64_t y,
                                          std::int64_t first, std::int64_t block) const {
        Tap* row = s.x.row(block, y) + s.x.pad * L;
        const auto place = s.x.place(y, first);
        step.copy_row(static_cast<const T*>(p.x), n, y, block, p.C,
                      [&](std::int64_t x, Vec<A> value)
                          CONVNEST_INLINE_LAMBDA { place.put(row + x * L, value); });
    }

    // `conv` holds the convolution of the pixels, and takes the norm's input. `next` is the image
    // that enters next: it is asked for here, where there is arithmetic to wait beside.
    void leave_pixels(A* conv, std::int64_t first, std::int64_t count, const T* next) const {
        T* kept = p.c == nullptr ? nullptr : static_cast<T*>(p.c) + first * p.C;
        A *mean = static_cast<A*>(p.mean), *rstd = static_cast<A*>(p.rstd);
        act_norm.forward(
            count, p.eps,
            [&](std::int64_t i, std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                ask_for(next, i * p.C + c, lanes);
                // Rounded even where it is not kept: the statistics must be those of the c that
                // backward sees, or a pixel of nearly equal channels (a large rstd) gets a wrong
                // xhat there.
                const auto value = rounded_to<T>(load_all(conv + i * step.pixel + c, lanes) +
                                                 load_all(conv_bias + c, lanes));
                if (kept != nullptr) store_as(kept + i * p.C + c, value, lanes);
                return value;
            },
            [&](std::int64_t i) CONVNEST_INLINE_LAMBDA { return conv + i * step.pixel; },
            static_cast<T*>(p.y) + first * p.C, mean == nullptr ? mean : mean + first,
            rstd == nullptr ? rstd : rstd + first);
    }
};

template <class T>
void forward(const DwconvGeluLayernormFwdParams& p) {
    using A = Accumulate<T>;
    using Tap = typename TapOf<T>::type;
    Forward<T> f{p,
                 RowStep<Tap>::plan(p.H, p.W, p.C, p.K, p.W <= kSmallMap ? kSmallMap : kWholeMap),
                 {},
                 0,
                 {p.C, p.gelu, p.norm_first, {}, {}},
                 {},
                 {}};
    row_kernels(p.K, &f.kernels);
    f.bands = forward_bands(p.N, p.H, p.K, num_threads());
    const CarvedScratch memory([&](Carver& carver) {
        f.weight = carver.take<Tap>(f.step.blocks * tap_elements<Tap>(p.K));
        f.conv_bias = carver.take<A>(f.step.channels);
        f.act_norm.take(carver);
    });
    copy_parameter(p.conv_bias, A(0), p.C, f.conv_bias);
    f.act_norm.copy(p.ln_weight, p.ln_bias);
    WeightCopy<Tap> copy{static_cast<const A*>(p.conv_weight), f.weight, p.C, p.K, false};
    const std::size_t scratch = bytes_of([&](Carver& carver) { f.take_scratch(carver); });
    run_phases({copy.units(), {p.N * f.bands, scratch, f.prepare, f.run_unit, &f}});
}

}  // namespace

void dwconv_gelu_layernorm_forward(const DwconvGeluLayernormFwdParams& p) {
    with_type(p.dtype, [&](auto type) { forward<typename decltype(type)::type>(p); });
}

}  // namespace convnest::CONVNEST_ISA
