// Activation and norm of rows of C channels, forward and backward, for gelu_layernorm and
// dwconv_gelu_layernorm, which differ in where rows come from and where they go. With xhat =
// (a - mean) rstd of the norm's input a, and act = GELU or nothing:
//
//   act, then norm (a = act(x)):  y = ln_weight xhat + ln_bias
//   norm first     (a = x):       y = act(ln_weight xhat + ln_bias)
// backward:
//   act, then norm:  e = dy;                                   dx = act'(x) da
//   norm first:      e = dy act'(ln_weight xhat + ln_bias);    dx = da
//   da = rstd (f - mean_c(f) - xhat mean_c(f xhat)),  f = e ln_weight
//   dln_weight = sum e xhat;  dln_bias = sum e
//
// One row at a time, in cache from its first pass to its last; it may enter beside the row before
// it that leaves (leave_and_enter).
#pragma once

#include "common/gelu.h"
#include "common/layernorm.h"
#include "common/parallel.h"
#include "common/parameters.h"

namespace convnest::CONVNEST_ISA {
namespace {

// leave(c, lanes) and enter(c, lanes) for the packs of a row each; in one loop if kMeet.
template <class A, bool kMeet, int N, class Leave, class Enter>
CONVNEST_INLINE void leave_and_enter(std::int64_t C, bool leaves, Leave&& leave, bool enters,
                                     Enter&& enter) {
    if constexpr (kMeet) {
        over_channels<A, N>(C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
            if (leaves) leave(c, lanes);
            if (enters) enter(c, lanes);
        });
    } else {
        if (leaves) over_channels<A, N>(C, leave);
        if (enters) over_channels<A, N>(C, enter);
    }
}

template <class T>
struct ActNorm {
    using A = Accumulate<T>;

    std::int64_t C;
    bool gelu, norm_first;
    A *ln_weight, *ln_bias;

    void take(Carver& carver) {
        for (A** at : {&ln_weight, &ln_bias}) *at = carver.take<A>(padded_channels<A>(C));
    }
    void copy(const void* weight, const void* bias) const {
        copy_parameter(weight, A(1), C, ln_weight);
        copy_parameter(bias, A(0), C, ln_bias);
    }

    // x(i, c, lanes) is a Pack of row i, which stays in values(i); mean and rstd may be null.
    template <class X, class Values>
    CONVNEST_INLINE_LAMBDA void forward(std::int64_t count, double eps, X&& x, Values&& values,
                                        T* y, void* mean, void* rstd) const {
        const bool before = gelu && !norm_first, after = gelu && norm_first;
        norm_rows<T>(
            count, C, static_cast<A>(eps),
            [&](std::int64_t i, std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                const auto value = x(i, c, lanes);
                return before ? gelu_of<T>(value) : value;
            },
            values,
            [&](std::int64_t i, const Statistics<A>& stats) CONVNEST_INLINE_LAMBDA {
                if (mean != nullptr) static_cast<A*>(mean)[i] = stats.mean;
                if (rstd != nullptr) static_cast<A*>(rstd)[i] = stats.rstd;
            },
            [&](std::int64_t i, std::int64_t c, const auto& xhat,
                auto lanes) CONVNEST_INLINE_LAMBDA {
                auto value = xhat * load_all(ln_weight + c, lanes) + load_all(ln_bias + c, lanes);
                if (after) value = gelu_of<T>(value);
                store_as(y + i * C + c, value, lanes);
            });
    }

    // One worker's memory for backward, all [Cp].
    struct Scratch {
        A* xhat;   // of one row
        A* slope;  // act'(x)
        A* f;
        A* dgamma;  // sums over rows
        A* dbeta;
    };
    Scratch take_scratch(Carver& carver) const {
        Scratch s;
        for (A** at : {&s.xhat, &s.slope, &s.f, &s.dgamma, &s.dbeta}) {
            *at = carver.take<A>(padded_channels<A>(C));
        }
        return s;
    }

    // dgamma and dbeta of these rows; leave(target(i), c, dx, lanes) takes the rest of row i.
    template <class F, class G>
    CONVNEST_INLINE_LAMBDA void backward(const Scratch& s, std::int64_t count, const T* dy,
                                         const T* x, const A* mean, const A* rstd, F&& target,
                                         G&& leave) const {
        const bool before = gelu && !norm_first, after = gelu && norm_first;
        for (std::int64_t c = 0; c < padded_channels<A>(C); ++c) s.dgamma[c] = s.dbeta[c] = 0;
        NormGradient<A> norm{};
        for (std::int64_t i = 0; i <= count; ++i) {
            const A row_mean = i < count ? mean[i] : A(0), row_rstd = i < count ? rstd[i] : A(0);
            const std::int64_t at = i < count ? i * C : 0;
            const T *x_row = x + at, *dy_row = dy + at;
            const auto to = target(i > 0 ? i - 1 : 0);
            ChannelSum<A> sum_f, sum_fx;
            leave_and_enter<A, kRowsMeet<T>, kGeluPack<T>>(
                C, i > 0,
                [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                    auto da = norm(load_all(s.f + c, lanes), load_all(s.xhat + c, lanes));
                    if (before) da = da * load_all(s.slope + c, lanes);
                    leave(to, c, da, lanes);
                },
                i < count,
                [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                    auto a = load_ahead(x_row + c, lanes);
                    if (before) {
                        const auto act = gelu_and_grad_of<T>(a);
                        store_all(s.slope + c, act.grad);
                        a = act.value;
                    }
                    const auto xhat = (a - row_mean) * row_rstd;
                    auto e = load_ahead(dy_row + c, lanes);
                    const auto gamma = load_all(ln_weight + c, lanes);
                    if (after) {
                        const auto y = xhat * gamma + load_all(ln_bias + c, lanes);
                        e = e * gelu_and_grad_of<T>(y).grad;
                    }
                    const auto f = e * gamma;
                    store_all(s.xhat + c, xhat);
                    store_all(s.f + c, f);
                    store_all(s.dgamma + c, load_all(s.dgamma + c, lanes) + e * xhat);
                    store_all(s.dbeta + c, load_all(s.dbeta + c, lanes) + e);
                    sum_f.add(f);
                    sum_fx.add(f * xhat);
                });
            norm = {row_rstd, sum_f.total() / static_cast<A>(C),
                    sum_fx.total() / static_cast<A>(C)};
        }
    }
};

}  // namespace
}  // namespace convnest::CONVNEST_ISA
