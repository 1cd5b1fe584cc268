// nested_conv forward:  g = GELU(h);  z = LN(g);  u = [g +] DW(z) + conv_bias;  v = GELU(u)
//
// Reads h; writes v, and where they are kept u, mean, rstd.
// A unit is a band of rows of one image. It marches down, a few rows a step: every input row gives
// a row of z (into the ring, in the accumulate type) and of g (kept for the shortcut), with GELU
// once per element; then, per vector of channels, the convolution from the ring; then the outer
// GELU, pixel by pixel. All global memory is read and written in order; the strided accesses stay
// in scratch memory of (K - 1 + S) rows, which is what fits the L2 cache.
#include "nested_conv.h"

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

    const NestedConvFwdParams& p;
    RowStep<A> step;
    RowKernels<A> kernels;
    std::int64_t bands, kept_rows;
    A *weight, *conv_bias, *ln_weight, *ln_bias;

    // One worker's memory.
    struct Scratch {
        Ring<A> z;
        A* g;     // [kept_rows][W][Cp]: the rows that the shortcut still needs
        A* conv;  // [S][W][Cp]
        std::size_t bytes;
    };

    Scratch carve(char* base) const {
        Carver carver(base);
        Scratch s;
        s.z = step.take_ring(carver);
        s.g = carver.take<A>(kept_rows * p.W * step.pixel);
        s.conv = carver.take<A>(step.rows * p.W * step.pixel);
        s.bytes = carver.used();
        return s;
    }

    static void prepare(char* base, void* context) {
        const Forward& f = *static_cast<const Forward*>(context);
        f.carve(base).z.clear(f.step.blocks);
    }

    static void run_unit(std::int64_t unit, char* base, void* context) {
        const Forward& f = *static_cast<const Forward*>(context);
        const Scratch s = f.carve(base);
        const std::int64_t n = unit / f.bands;
        const Range band = part_of(f.p.H, f.bands, unit % f.bands);
        std::int64_t entered = f.step.first_row(band.begin);
        for (std::int64_t y = band.begin; y < band.end; y += f.step.rows) {
            const std::int64_t count = band.end - y < f.step.rows ? band.end - y : f.step.rows;
            for (; entered < f.step.end_row(y + count); ++entered) {
                f.enter_row(s, n, entered, entered >= band.begin && entered < band.end);
            }
            f.step.convolve(f.kernels, s.z, f.weight, y, count, s.conv, f.p.W * f.step.pixel,
                            f.step.pixel, L);
            for (std::int64_t r = 0; r < count; ++r) f.leave_row(s, n, y + r, r);
        }
    }

    // g and z of one image row.
    void enter_row(const Scratch& s, std::int64_t n, std::int64_t y, bool owned) const {
        const std::int64_t first = (n * p.H + y) * p.W;
        const T* h_row = static_cast<const T*>(p.h) + first * p.C;
        A* g_row = s.g + (y % kept_rows) * p.W * step.pixel;
        A* z_row = s.z.row(0, y) + s.z.pad * L;
        for (std::int64_t x = 0; x < p.W; ++x) {
            const T* h = h_row + x * p.C;
            A* g = g_row + x * step.pixel;
            ChannelSum<A> sum;
            over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                const auto value = gelu_of(load_as(h + c, lanes));
                store_all(g + c, value);
                sum.add(value);
            });
            const auto stats = row_statistics(g, p.C, sum.total(), static_cast<A>(p.eps));
            A* z = z_row + x * L;
            over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                const auto xhat = (load_all(g + c, lanes) - stats.mean) * stats.rstd;
                const auto gamma = load_all(ln_weight + c, lanes);
                store_all(z, xhat * gamma + load_all(ln_bias + c, lanes), s.z.block_stride);
                z += lanes.kVectors * s.z.block_stride;
            });
            if (owned && p.mean != nullptr) static_cast<A*>(p.mean)[first + x] = stats.mean;
            if (owned && p.rstd != nullptr) static_cast<A*>(p.rstd)[first + x] = stats.rstd;
        }
    }

    // u and v of one image row, from the r-th row of this step's convolution.
    void leave_row(const Scratch& s, std::int64_t n, std::int64_t y, std::int64_t r) const {
        const std::int64_t first = (n * p.H + y) * p.W;
        for (std::int64_t x = 0; x < p.W; ++x) {
            const A* conv = s.conv + (r * p.W + x) * step.pixel;
            const A* g = s.g + ((y % kept_rows) * p.W + x) * step.pixel;
            T* v = static_cast<T*>(p.v) + (first + x) * p.C;
            T* u = p.u == nullptr ? nullptr : static_cast<T*>(p.u) + (first + x) * p.C;
            over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                auto sum = load_all(conv + c, lanes) + load_all(conv_bias + c, lanes);
                if (p.shortcut) sum = sum + load_all(g + c, lanes);
                if (u != nullptr) store_as(u + c, sum, lanes);
                store_as(v + c, gelu_of(sum), lanes);
            });
        }
    }
};

template <class T>
void forward(const NestedConvFwdParams& p) {
    using A = Accumulate<T>;
    Forward<T> f{p, RowStep<A>::plan(p.H, p.W, p.C, p.K), {}, 0, 0, {}, {}, {}, {}};
    row_kernels(p.K, &f.kernels);
    f.bands = forward_bands(p.N, p.H, p.K, num_threads());
    // Without the shortcut g is only the row that is being normalised.
    f.kept_rows = p.shortcut ? f.step.rows + p.K / 2 : 1;
    const auto carve = [&](char* base) {
        Carver carver(base);
        f.weight = carver.take<A>(f.step.channels * p.K * p.K);
        f.conv_bias = carver.take<A>(f.step.channels);
        f.ln_weight = carver.take<A>(f.step.channels);
        f.ln_bias = carver.take<A>(f.step.channels);
        return carver.used();
    };
    const CallScratch memory(carve(nullptr));
    carve(memory.data());
    copy_parameter(p.conv_bias, A(0), p.C, f.conv_bias);
    copy_parameter(p.ln_weight, A(1), p.C, f.ln_weight);
    copy_parameter(p.ln_bias, A(0), p.C, f.ln_bias);
    WeightCopy<A>{static_cast<const A*>(p.conv_weight), f.weight, p.C, p.K * p.K, false}.run();
    run_units({p.N * f.bands, f.carve(nullptr).bytes, f.prepare, f.run_unit, &f});
}

}  // namespace

void nested_conv_forward(const NestedConvFwdParams& p) {
    switch (p.dtype) {
        case DType::kFloat32: return forward<float>(p);
        case DType::kFloat64: return forward<double>(p);
        case DType::kBFloat16: return forward<BFloat16>(p);
        case DType::kFloat16: return forward<Float16>(p);
    }
}

}  // namespace convnest::CONVNEST_ISA
