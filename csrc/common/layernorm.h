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

// Whether a row that enters a norm shares its loop with the row before it, which leaves: the one is
// arithmetic, the other waits for memory. With 16 registers, rows of 16-bit elements, which have
// conversions beside, are faster one after the other.
template <class T>
constexpr bool kRowsMeet = kVectorBytes == 64 || sizeof(T) != 2;

// Rows of C channels through a norm: value(i, c, lanes) is a Pack of the norm's input, whose rows
// stay in values(i); leave(i, c, xhat, lanes) takes the result, keep(i, statistics) the statistics.
template <class T, bool kMeet = kRowsMeet<T>, class Value, class Values, class Keep, class Leave>
CONVNEST_INLINE void norm_rows(std::int64_t count, std::int64_t C, Accumulate<T> eps, Value&& value,
                               Values&& values, Keep&& keep, Leave&& leave) {
    using A = Accumulate<T>;
    Statistics<A> stats{};
    for (std::int64_t i = 0; i <= count; ++i) {
        ChannelSum<A> sum;
        A* row = values(i < count ? i : 0);
        const A* before = values(i > 0 ? i - 1 : 0);
        const auto enter = [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
            const auto pack = value(i, c, lanes);
            store_all(row + c, pack);
            sum.add(pack);
        };
        const auto leave_before = [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
            leave(i - 1, c, (load_all(before + c, lanes) - stats.mean) * stats.rstd, lanes);
        };
        // In one loop what leaves is stored late: on AVX-512 that made float32 1.15 times as fast.
        if constexpr (kMeet) {
            over_channels<A, kGeluPack<T>>(C,
                                           [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                                               if (i < count) enter(c, lanes);
                                               if (i > 0) leave_before(c, lanes);
                                           });
        } else {
            if (i > 0) over_channels<A, kGeluPack<T>>(C, leave_before);
            if (i < count) over_channels<A, kGeluPack<T>>(C, enter);
        }
        if (i == count) break;
        stats = row_statistics(row, C, sum.total(), eps);
        keep(i, stats);
    }
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
