// Rows of channels, several vectors at a time.
//
// A Pack is N vectors of consecutive channels, and every operation on it is done to all N before
// the next one. That is what it is for: GELU is one long chain of dependent instructions, and a
// processor's window does not reach far enough to find the next vector's chain on its own.
// (Measured on Zen 4, float32: 2.14 G elements/s alone, 2.34 in packs of two.)
#pragma once

#include "simd.h"

namespace convnest::CONVNEST_ISA {
namespace {

template <class A, int N>
struct Pack {
    Vec<A> v[N];
};

template <class A, int N, class F>
CONVNEST_INLINE Pack<A, N> make_pack(F&& f) {
    Pack<A, N> r;
    unroll<N>([&](auto i) CONVNEST_INLINE_LAMBDA { r.v[i] = f(i); });
    return r;
}

#define CONVNEST_PACK_OPERATOR(op)                                                               \
    template <class A, int N>                                                                    \
    CONVNEST_INLINE Pack<A, N> operator op(const Pack<A, N>& a, const Pack<A, N>& b) {           \
        return make_pack<A, N>([&](auto i) CONVNEST_INLINE_LAMBDA { return a.v[i] op b.v[i]; }); \
    }                                                                                            \
    template <class A, int N>                                                                    \
    CONVNEST_INLINE Pack<A, N> operator op(const Pack<A, N>& a, A b) {                           \
        return make_pack<A, N>([&](auto i) CONVNEST_INLINE_LAMBDA { return a.v[i] op b; });      \
    }                                                                                            \
    template <class A, int N>                                                                    \
    CONVNEST_INLINE Pack<A, N> operator op(A a, const Pack<A, N>& b) {                           \
        return make_pack<A, N>([&](auto i) CONVNEST_INLINE_LAMBDA { return a op b.v[i]; });      \
    }
CONVNEST_PACK_OPERATOR(+)
CONVNEST_PACK_OPERATOR(-)
CONVNEST_PACK_OPERATOR(*)
#undef CONVNEST_PACK_OPERATOR

// ---- loads and stores; the last vector of a row may be partial ----

template <int N>
struct AllLanes {
    static constexpr int kVectors = N;
};
struct FirstLanes {
    static constexpr int kVectors = 1;
    int count;
};

// From and to a tensor. Lanes that are not there are read as 0.
template <class T, int N>
CONVNEST_INLINE Pack<Accumulate<T>, N> load_as(const T* p, AllLanes<N>) {
    using A = Accumulate<T>;
    return make_pack<A, N>([&](auto i)
                               CONVNEST_INLINE_LAMBDA { return load_from(p + i * kLanes<A>); });
}
template <class T>
CONVNEST_INLINE Pack<Accumulate<T>, 1> load_as(const T* p, FirstLanes lanes) {
    T padded[kLanes<Accumulate<T>>] = {};
    for (int i = 0; i < lanes.count; ++i) padded[i] = p[i];
    return {load_from(padded)};
}

// Asks for the memory of a Pack that is loaded later, `offset` elements from p on. That may lie
// beyond the tensor: a prefetch there does nothing.
template <class T, class Lanes>
CONVNEST_INLINE void ask_for(const T* p, std::int64_t offset, Lanes) {
    constexpr int kLine = 64;
    constexpr int kBytes = Lanes::kVectors * kLanes<Accumulate<T>> * static_cast<int>(sizeof(T));
    // As a number: a pointer there would be undefined.
    const std::uintptr_t first = reinterpret_cast<std::uintptr_t>(p) + offset * sizeof(T);
    unroll<(kBytes + kLine - 1) / kLine>([&](auto i) CONVNEST_INLINE_LAMBDA {
        __builtin_prefetch(reinterpret_cast<const void*>(first + i * kLine));
    });
}

// A load on a walk along a tensor, which asks for what comes kAheadBytes later: the processor's
// own prefetchers have brought that to the L2 cache at best. (Measured on Zen 4: 2 to 8% of a
// forward.)
constexpr int kAheadBytes = 2048;
template <class T, class Lanes>
CONVNEST_INLINE Pack<Accumulate<T>, Lanes::kVectors> load_ahead(const T* p, Lanes lanes) {
    ask_for(p, kAheadBytes / sizeof(T), lanes);
    return load_as(p, lanes);
}

template <class T, int N>
CONVNEST_INLINE void store_as(T* p, const Pack<Accumulate<T>, N>& pack, AllLanes<N>) {
    unroll<N>([&](auto i)
                  CONVNEST_INLINE_LAMBDA { store_to(p + i * kLanes<Accumulate<T>>, pack.v[i]); });
}
template <class T>
CONVNEST_INLINE void store_as(T* p, const Pack<Accumulate<T>, 1>& pack, FirstLanes lanes) {
    T padded[kLanes<Accumulate<T>>];
    store_to(padded, pack.v[0]);
    for (int i = 0; i < lanes.count; ++i) p[i] = padded[i];
}

// What storing as T and loading again would give, but for subnormal numbers, which may become 0.
template <class T, int N>
CONVNEST_INLINE Pack<Accumulate<T>, N> rounded_to(const Pack<Accumulate<T>, N>& pack) {
    if constexpr (sizeof(T) != 2) {
        return pack;
    } else {
        return make_pack<float, N>([&](auto i) CONVNEST_INLINE_LAMBDA {
            return widen(narrow_normal(pack.v[i], T{}), T{});
        });
    }
}

// From and to a buffer of whole vectors.
template <class A, class Lanes>
CONVNEST_INLINE Pack<A, Lanes::kVectors> load_all(const A* p, Lanes) {
    return make_pack<A, Lanes::kVectors>(
        [&](auto i) CONVNEST_INLINE_LAMBDA { return load(p + i * kLanes<A>); });
}
// With `stride` elements from one vector to the next.
template <class A, int N>
CONVNEST_INLINE void store_all(A* p, const Pack<A, N>& pack, std::int64_t stride = kLanes<A>) {
    unroll<N>([&](auto i) CONVNEST_INLINE_LAMBDA { store(p + i * stride, pack.v[i]); });
}

template <class A, int N>
CONVNEST_INLINE Pack<A, N> zero_others(const Pack<A, N>& pack, AllLanes<N>) {
    return pack;
}
template <class A>
CONVNEST_INLINE Pack<A, 1> zero_others(Pack<A, 1> pack, FirstLanes lanes) {
    for (int i = lanes.count; i < kLanes<A>; ++i) pack.v[0][i] = 0;
    return pack;
}

// f(c, lanes) for all of a row's C channels, in packs as long as they last.
constexpr int kPack = kVectorBytes == 64 ? 4 : 2;
template <class A, int N = kPack, class F>
CONVNEST_INLINE void over_channels(std::int64_t C, F&& f) {
    constexpr int L = kLanes<A>;
    std::int64_t c = 0;
    for (; c + N * L <= C; c += N * L) f(c, AllLanes<N>{});
    for (; c + L <= C; c += L) f(c, AllLanes<1>{});
    if (c < C) f(c, FirstLanes{static_cast<int>(C - c)});
}

// Packs that leave registers for GELU among other things: that of float32 needs more of them.
template <class T>
constexpr int kGeluPack = sizeof(T) == 4 ? 2 : kPack;

template <class A>
struct ChannelSum {
    Vec<A> sums[kPack] = {};

    template <int N>
    CONVNEST_INLINE_LAMBDA void add(const Pack<A, N>& pack) {
        unroll<N>([&](auto i) CONVNEST_INLINE_LAMBDA { sums[i] += pack.v[i]; });
    }
    CONVNEST_INLINE_LAMBDA A total() const {
        Vec<A> sum = sums[0];
        for (int i = 1; i < kPack; ++i) sum += sums[i];
        return lane_sum<A>(sum);
    }
};

}  // namespace
}  // namespace convnest::CONVNEST_ISA
