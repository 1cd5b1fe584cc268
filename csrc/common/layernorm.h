// LayerNorm of one row of C channels that lies in cache: two-pass statistics.
//
//   mean = sum(x) / C;  rstd = 1 / sqrt(sum((x - mean)^2) / C + eps)
//   with dz the gradient of xhat = (x - mean) rstd (that is dy * weight) the gradient of x is
//   dx = rstd (dz - sum(dz) / C - xhat sum(dz xhat) / C)
#pragma once

#include <cstdint>

#include "pack.h"

namespace convnest::CONVNEST_ISA {
namespace {

template <class A>
struct Statistics {
    A mean, rstd;
};

// `row` holds whole vectors; `sum` is the sum over its C channels.
template <class A>
CONVNEST_INLINE Statistics<A> row_statistics(const A* row, std::int64_t C, A sum, A eps) {
    const A mean = sum / static_cast<A>(C);
    ChannelSum<A> squares;
    over_channels<A>(C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
        const auto centred = zero_others(load_all(row + c, lanes) - mean, lanes);
        squares.add(centred * centred);
    });
    return {mean, A(1) / square_root(squares.total() / static_cast<A>(C) + eps)};
}

// The two sums of the gradient, over C already, and rstd: dx = rstd (dz - mean_dz - xhat mean_dzx).
template <class A>
struct NormGradient {
    A rstd, mean_dz, mean_dzx;
    template <int N>
    CONVNEST_INLINE_LAMBDA Pack<A, N> operator()(const Pack<A, N>& dz,
                                                 const Pack<A, N>& xhat) const {
        return rstd * (dz - mean_dz - xhat * mean_dzx);
    }
};

}  // namespace
}  // namespace convnest::CONVNEST_ISA
