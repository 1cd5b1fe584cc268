// The forward pass of nested_conv on the rows of one band, for nested_conv and nested_block, which
// differ in where rows come from and where they go.
//
// enter_row takes a row of g, keeps it for the shortcut and gives z (into the ring); convolve does
// the rows of a step from the ring; leave_row adds bias and shortcut and applies the outer GELU,
// pixel by pixel. The strided accesses stay in scratch memory of (K - 1 + S) rows, which is what
// fits the L2 cache.
#pragma once

#include <cstdint>

#include "common/gelu.h"
#include "common/layernorm.h"
#include "common/parameters.h"
#include "depthwise_row.h"
#include "row_step.h"

namespace convnest::CONVNEST_ISA {
namespace {

struct NestedConvVectors {
    const void *conv_bias, *ln_weight, *ln_bias;
};

template <class T>
struct NestedConvRows {
    using A = Accumulate<T>;
    using Tap = typename TapOf<T>::type;
    static constexpr int L = kLanes<A>;

    RowStep<Tap> step;
    RowKernels<Tap> kernels;
    std::int64_t C, kept_rows;
    A eps;
    bool shortcut;
    Tap* weight;
    A *conv_bias, *ln_weight, *ln_bias;

    // One worker's memory.
    struct Scratch {
        Ring<Tap> z;
        A* g;     // [kept_rows][W][Cp]: the rows that the shortcut still needs
        A* conv;  // [S][W][Cp]
    };

    static NestedConvRows plan(std::int64_t H, std::int64_t W, std::int64_t C, int K, double eps,
                               bool shortcut) {
        const auto step = RowStep<Tap>::plan(H, W, C, K);
        NestedConvRows r{step, {}, C, 1, static_cast<A>(eps), shortcut, {}, {}, {}, {}};
        row_kernels(step.K, &r.kernels);
        // Without the shortcut g is only the row that is being normalised.
        if (shortcut) r.kept_rows = step.rows + step.K / 2;
        return r;
    }

    // Parameters, shared by all workers.
    void take_weights(Carver& carver) {
        weight = carver.take<Tap>(step.blocks * tap_elements<Tap>(step.K));
    }
    WeightCopy<Tap> weight_copy(const void* conv_weight) const {
        return {static_cast<const A*>(conv_weight), weight, C, step.K, false};
    }
    void take_vectors(Carver& carver) {
        conv_bias = carver.take<A>(step.channels);
        ln_weight = carver.take<A>(step.channels);
        ln_bias = carver.take<A>(step.channels);
    }
    void copy_vectors(const NestedConvVectors& p) const {
        copy_parameter(p.conv_bias, A(0), C, conv_bias);
        copy_parameter(p.ln_weight, A(1), C, ln_weight);
        copy_parameter(p.ln_bias, A(0), C, ln_bias);
    }

    Scratch take_scratch(Carver& carver) const {
        Scratch s;
        s.z = step.take_ring(carver);
        s.g = carver.take<A>(kept_rows * step.W * step.pixel);
        s.conv = carver.take<A>(step.rows * step.W * step.pixel);
        return s;
    }

    // z of image row y of those that enter from `first` on, and the statistics of its pixels where
    // they are kept (not null). g(x, c, lanes) is a Pack of GELU(h).
    template <class F>
    CONVNEST_INLINE_LAMBDA void enter_row(const Scratch& s, std::int64_t y, std::int64_t first,
                                          A* mean, A* rstd, F&& g) const {
        A* g_row = s.g + (y % kept_rows) * step.W * step.pixel;
        Tap* z_row = s.z.row(0, y) + s.z.pad * L;
        const auto place = s.z.place(y, first);
        // In one loop for 16-bit elements and 16 registers too: apart, stage 4 took 3% more.
        norm_rows<T, true>(
            step.W, C, eps, g,
            [&](std::int64_t x) CONVNEST_INLINE_LAMBDA { return g_row + x * step.pixel; },
            [&](std::int64_t x, const Statistics<A>& stats) CONVNEST_INLINE_LAMBDA {
                if (mean != nullptr) mean[x] = stats.mean;
                if (rstd != nullptr) rstd[x] = stats.rstd;
            },
            [&](std::int64_t x, std::int64_t c, const auto& xhat,
                auto lanes) CONVNEST_INLINE_LAMBDA {
                const auto z = xhat * load_all(ln_weight + c, lanes) + load_all(ln_bias + c, lanes);
                place.put_all(z_row + x * L + c / L * s.z.block_stride, z, s.z.block_stride);
            });
    }

    void convolve(const Scratch& s, std::int64_t y, std::int64_t count) const {
        step.convolve(kernels, s.z, weight, y, count, s.conv, step.W * step.pixel, step.pixel, L,
                      [](std::int64_t) {});
    }

    // u (where it is kept) and v of image row y, the r-th of this step; v(x, c, pack, lanes) takes
    // it.
    template <class F>
    CONVNEST_INLINE_LAMBDA void leave_row(const Scratch& s, std::int64_t y, std::int64_t r,
                                          T* u_row, F&& v) const {
        for (std::int64_t x = 0; x < step.W; ++x) {
            const A* conv = s.conv + (r * step.W + x) * step.pixel;
            const A* g = s.g + ((y % kept_rows) * step.W + x) * step.pixel;
            T* u = u_row == nullptr ? nullptr : u_row + x * C;
            over_channels<A>(C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                auto sum = load_all(conv + c, lanes) + load_all(conv_bias + c, lanes);
                if (shortcut) sum = sum + load_all(g + c, lanes);
                if (u != nullptr) store_as(u + c, sum, lanes);
                v(x, c, gelu_of<T>(sum), lanes);
            });
        }
    }
};

}  // namespace
}  // namespace convnest::CONVNEST_ISA
