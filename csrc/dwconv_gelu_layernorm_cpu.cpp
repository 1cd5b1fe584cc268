// dwconv_gelu_layernorm forward:  c = DW(x) + conv_bias;  y = LN(act(c)), or act(LN(c)) norm first
//
// Reads x; writes y, and where they are kept c, mean, rstd.
// A unit is a band of rows of one image. It marches down, a few rows a step: input rows enter the
// ring in the accumulate type; per vector of channels the convolution goes to a row buffer; then
// every pixel's channels, contiguous there, get bias, activation and norm.
#include "dwconv_gelu_layernorm.h"

#include "common/call.h"
#include "common/layernorm.h"
#include "common/parameters.h"
#include "common/partition.h"
#include "depthwise_row.h"
#include "row_step.h"

namespace convnest::CONVNEST_ISA {
namespace {

template <class T>
struct Forward {
    using A = Accumulate<T>;
    static constexpr int L = kLanes<A>;

    const DwconvGeluLayernormFwdParams& p;
    RowStep<A> step;
    RowKernels<A> kernels;
    std::int64_t bands;
    A *weight, *conv_bias, *ln_weight, *ln_bias;

    // One worker's memory.
    struct Scratch {
        Ring<A> x;
        A* conv;  // [S][W][Cp]
    };

    Scratch take_scratch(Carver& carver) const {
        Scratch s;
        s.x = step.take_ring(carver);
        s.conv = carver.take<A>(step.rows * p.W * step.pixel);
        return s;
    }

    static void prepare(char* base, void* context) {
        const Forward& f = *static_cast<const Forward*>(context);
        Carver carver(base);
        f.take_scratch(carver).x.clear(f.step.blocks);
    }

    static void run_unit(std::int64_t unit, char* base, void* context) {
        const Forward& f = *static_cast<const Forward*>(context);
        Carver carver(base);
        const Scratch s = f.take_scratch(carver);
        const std::int64_t n = unit / f.bands;
        const Range band = part_of(f.p.H, f.bands, unit % f.bands);
        std::int64_t entered = f.step.first_row(band.begin);
        for (std::int64_t y = band.begin; y < band.end; y += f.step.rows) {
            const std::int64_t count = band.end - y < f.step.rows ? band.end - y : f.step.rows;
            for (; entered < f.step.end_row(y + count); ++entered) {
                f.step.enter(s.x, static_cast<const T*>(f.p.x), n, entered, f.p.C);
            }
            f.step.convolve(f.kernels, s.x, f.weight, y, count, s.conv, f.p.W * f.step.pixel,
                            f.step.pixel, L);
            const std::int64_t first = (n * f.p.H + y) * f.p.W;
            for (std::int64_t i = 0; i < count * f.p.W; ++i) {
                f.leave_pixel(s.conv + i * f.step.pixel, first + i);
            }
        }
    }

    // `row` is the pixel's convolution; it is overwritten.
    void leave_pixel(A* row, std::int64_t pixel) const {
        const bool gelu_before = p.gelu && !p.norm_first, gelu_after = p.gelu && p.norm_first;
        T* kept = p.c == nullptr ? nullptr : static_cast<T*>(p.c) + pixel * p.C;
        T* y = static_cast<T*>(p.y) + pixel * p.C;
        ChannelSum<A> sum;
        over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
            // Rounded even where it is not kept: the statistics must be those of the c that
            // backward sees, or a pixel of nearly equal channels (a large rstd) gets a wrong xhat
            // there.
            auto value = rounded_to<T>(load_all(row + c, lanes) + load_all(conv_bias + c, lanes));
            if (kept != nullptr) store_as(kept + c, value, lanes);
            if (gelu_before) value = gelu_of<T>(value);
            store_all(row + c, value);
            sum.add(value);
        });
        const auto stats = row_statistics(row, p.C, sum.total(), static_cast<A>(p.eps));
        over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
            const auto xhat = (load_all(row + c, lanes) - stats.mean) * stats.rstd;
            auto value = xhat * load_all(ln_weight + c, lanes) + load_all(ln_bias + c, lanes);
            if (gelu_after) value = gelu_of<T>(value);
            store_as(y + c, value, lanes);
        });
        if (p.mean != nullptr) static_cast<A*>(p.mean)[pixel] = stats.mean;
        if (p.rstd != nullptr) static_cast<A*>(p.rstd)[pixel] = stats.rstd;
    }
};

template <class T>
void forward(const DwconvGeluLayernormFwdParams& p) {
    using A = Accumulate<T>;
    Forward<T> f{p, RowStep<A>::plan(p.H, p.W, p.C, p.K), {}, 0, {}, {}, {}, {}};
    row_kernels(p.K, &f.kernels);
    f.bands = forward_bands(p.N, p.H, p.K, num_threads());
    const CarvedScratch memory([&](Carver& carver) {
        f.weight = carver.take<A>(f.step.channels * p.K * p.K);
        f.conv_bias = carver.take<A>(f.step.channels);
        f.ln_weight = carver.take<A>(f.step.channels);
        f.ln_bias = carver.take<A>(f.step.channels);
    });
    copy_parameter(p.conv_bias, A(0), p.C, f.conv_bias);
    copy_parameter(p.ln_weight, A(1), p.C, f.ln_weight);
    copy_parameter(p.ln_bias, A(0), p.C, f.ln_bias);
    WeightCopy<A>{static_cast<const A*>(p.conv_weight), f.weight, p.C, p.K * p.K, false}.run();
    const std::size_t scratch = bytes_of([&](Carver& carver) { f.take_scratch(carver); });
    run_units({p.N * f.bands, scratch, f.prepare, f.run_unit, &f});
}

}  // namespace

void dwconv_gelu_layernorm_forward(const DwconvGeluLayernormFwdParams& p) {
    with_type(p.dtype, [&](auto type) { forward<typename decltype(type)::type>(p); });
}

}  // namespace convnest::CONVNEST_ISA
