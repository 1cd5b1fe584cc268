// What nested_block's backward does to a narrow pixel: the last norm and the outer shortcut. The
// formulas are in nested_block_bwd_cpu.cpp.
#pragma once

#include "nested_block_rows.h"

namespace convnest::CONVNEST_ISA {
namespace {

template <class T>
struct NestedBlockBwdPixel {
    using A = Accumulate<T>;
    using E = typename OperandOf<T>::type;
    // Gradients that are sums over pixels, [kVectors][Cp].
    enum Vector { kFc2Bias, kPostWeight, kPostBias, kScale, kVectors };

    const NestedBlockBwdParams& p;
    std::int64_t narrow;  // C rounded up to whole vectors
    A *post_weight, *scale;

    static NestedBlockBwdPixel plan(const NestedBlockBwdParams& p) {
        return {p, padded_channels<A>(p.C), {}, {}};
    }
    std::int64_t sums() const { return kVectors * narrow; }

    void take_parameters(Carver& carver) {
        post_weight = carver.take<A>(narrow);
        scale = carver.take<A>(narrow);
    }
    void copy_parameters() const {
        copy_parameter(p.post_weight, A(1), p.C, post_weight);
        copy_parameter(p.scale, A(1), p.C, scale);
    }

    // dt, also as an operand where that has a type of its own (else null); adds to `sum` unless it
    // is null.
    void enter(std::int64_t pixel, A* dt, E* operand, A* sum) const {
        const T* dy = static_cast<const T*>(p.dy) + pixel * p.C;
        const T* t = static_cast<const T*>(p.t) + pixel * p.C;
        const T* x = static_cast<const T*>(p.x) + pixel * p.C;
        const A mean = static_cast<const A*>(p.post_mean)[pixel];
        const A rstd = static_cast<const A*>(p.post_rstd)[pixel];
        const auto add = [&](int which, std::int64_t c, const auto& pack, auto lanes) {
            A* at = sum + which * narrow + c;
            store_all(at, load_all(at, lanes) + pack);
        };
        ChannelSum<A> sum_f, sum_fx;
        over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
            const auto e = load_as(dy + c, lanes);
            const auto xhat = (load_as(t + c, lanes) - mean) * rstd;
            const auto f = e * load_all(post_weight + c, lanes);
            store_all(dt + c, f);
            sum_f.add(f);
            sum_fx.add(f * xhat);
            if (sum == nullptr) return;
            add(kPostWeight, c, e * xhat, lanes);
            add(kPostBias, c, e, lanes);
            add(kScale, c, e * load_as(x + c, lanes), lanes);
        });
        const NormGradient<A> norm{rstd, sum_f.total() / static_cast<A>(p.C),
                                   sum_fx.total() / static_cast<A>(p.C)};
        over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
            const auto xhat = (load_as(t + c, lanes) - mean) * rstd;
            const auto value =
                rounded_to<T>(zero_others(norm(load_all(dt + c, lanes), xhat), lanes));
            store_all(dt + c, value);
            if constexpr (!std::is_same<A, E>::value) store_operand(operand + c, value);
            if (sum != nullptr) add(kFc2Bias, c, value, lanes);
        });
    }

    // dx, from what came through the layers.
    void leave(std::int64_t pixel, const A* through) const {
        const T* dy = static_cast<const T*>(p.dy) + pixel * p.C;
        T* dx = static_cast<T*>(p.dx) + pixel * p.C;
        over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
            store_as(
                dx + c,
                load_as(dy + c, lanes) * load_all(scale + c, lanes) + load_all(through + c, lanes),
                lanes);
        });
    }

    // x with `stride` elements from one pixel to the next, as a factor of dW1.
    void copy_x(std::int64_t first, std::int64_t pixels, A* out, std::int64_t stride) const {
        const T* x = static_cast<const T*>(p.x) + first * p.C;
        for (std::int64_t i = 0; i < pixels; ++i) {
            over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                store_as(out + i * stride + c, load_as(x + i * p.C + c, lanes), lanes);
            });
        }
    }

    void write(const A* sum) const {
        copy_to(p.dfc2_bias, sum + kFc2Bias * narrow, p.C);
        copy_to(p.dpost_weight, sum + kPostWeight * narrow, p.C);
        copy_to(p.dpost_bias, sum + kPostBias * narrow, p.C);
        copy_to(p.dscale, sum + kScale * narrow, p.C);
    }
    static void copy_to(void* gradient, const A* sum, std::int64_t count) {
        for (std::int64_t i = 0; gradient != nullptr && i < count; ++i) {
            static_cast<A*>(gradient)[i] = sum[i];
        }
    }

    // Of the forward pass, to compute h and u again where they are not given.
    NestedBlockFwdParams again() const {
        NestedBlockFwdParams forward{};
        forward.x = p.x;
        forward.fc1_weight = p.h == nullptr ? p.fc1_weight : nullptr;
        forward.fc1_bias = p.fc1_bias;
        forward.norm_weight = p.norm_weight;
        forward.norm_bias = p.norm_bias;
        forward.conv_weight = p.conv_weight;
        forward.conv_bias = p.conv_bias;
        forward.N = p.N;
        forward.H = p.H;
        forward.W = p.W;
        forward.C = p.C;
        forward.D = p.D;
        forward.K = p.K;
        forward.eps = p.eps;
        forward.shortcut = p.shortcut;
        return forward;
    }
};

}  // namespace
}  // namespace convnest::CONVNEST_ISA
