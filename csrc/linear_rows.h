// Linear layer on a few rows whose input lies in cache: y[i, m] = bias[m] + sum_k x[i, k] w[m, k].
//
// The weights are packed once per call into panels of a few vectors of outputs, [panel][K][V * L],
// the last one as narrow as it is. A register tile is P rows x V vectors: per k it loads V vectors
// of weights and multiplies each by one broadcast input of each row. K is cut so that the part of a
// panel that all row tiles walk over stays in the L1 cache.
// Operands are float or double; or, where the instruction set multiplies pairs of bfloat16 and adds
// them in float, BFloat16, whose packed element is a pair of k (twice the rate).
// Used by nested_block, whose layers read and write scratch memory: of one band of image rows, or
// of a few small images (nested_block_slices.h), where a part of K or of the outputs is done at a
// time.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/parameters.h"
#include "common/partition.h"

namespace convnest::CONVNEST_ISA {

namespace {

template <class E>
struct Operand {
    using Packed = E;
    static constexpr int kStep = 1;  // of k in a packed element
};
template <>
struct Operand<BFloat16> {
    using Packed = std::uint32_t;
    static constexpr int kStep = 2;
};

// What a layer's input of T is multiplied as.
template <class T>
struct OperandOf {
    using type = Accumulate<T>;
};
#if defined(__AVX512BF16__)
template <>
struct OperandOf<BFloat16> {
    using type = BFloat16;
};
#endif

template <class E>
CONVNEST_INLINE std::int64_t packed_steps(std::int64_t K) {
    return (K + Operand<E>::kStep - 1) / Operand<E>::kStep;
}
template <class E>
CONVNEST_INLINE std::int64_t packed_elements(std::int64_t K, std::int64_t M) {
    return packed_steps<E>(K) * padded_channels<Accumulate<E>>(M);
}

// Vectors of a panel: 8 x 3 sums, 3 weights and a broadcast input fit 32 registers.
constexpr int kPanel = kVectorBytes == 64 ? 3 : 2;

// The i-th of the panels that `blocks` vectors are cut into. A last panel of a single vector would
// wait for its loads: it shares the vectors of the one before.
struct Panel {
    std::int64_t first, vectors;
};
CONVNEST_INLINE std::int64_t panel_count(std::int64_t blocks) {
    return (blocks + kPanel - 1) / kPanel;
}
CONVNEST_INLINE Panel panel_at(std::int64_t blocks, std::int64_t i) {
    const std::int64_t first = i * kPanel, last = panel_count(blocks) - 1;
    const bool share = kPanel == 3 && last > 0 && blocks % kPanel == 1;
    if (share && i == last) return {first - 1, 2};
    if (share && i == last - 1) return {first, 2};
    return {first, blocks - first < kPanel ? blocks - first : kPanel};
}

}  // namespace

// y is written in whole vectors; its lanes from M on are 0. Rows of BFloat16 must be followed by a
// zero where K is odd, and x_stride is even.
template <class E>
struct LinearRows {
    using A = Accumulate<E>;
    const E* x;
    std::int64_t x_stride;
    const typename Operand<E>::Packed* weight;  // as PackLinear leaves it
    const A* bias;                              // padded to whole vectors
    A* y;
    std::int64_t y_stride;
    std::int64_t rows, K, M;
};

// weight[m * m_stride + k * k_stride] into panels, packed_elements<E>(K, M).
template <class E>
struct PackLinear {
    const Accumulate<E>* weight;
    std::int64_t m_stride, k_stride;
    typename Operand<E>::Packed* packed;
    std::int64_t K, M;
};

// The weight gradient of a layer: sum[m, c] += sum_i a[i, m] b[i, c]; columns in whole vectors.
// With `first` what sum held before does not count.
template <class A>
struct OuterRows {
    const A* a;
    std::int64_t a_stride;
    const A* b;
    std::int64_t b_stride;
    A* sum;
    std::int64_t sum_stride;
    std::int64_t rows, M, columns;
    bool first = false;
};

// Elements of memory for the factors as pairs of rows.
CONVNEST_INLINE std::int64_t pair_elements(std::int64_t rows, std::int64_t M,
                                           std::int64_t columns) {
    return (rows + 1) / 2 * (M + columns);
}

void outer_rows(const OuterRows<float>&);
void outer_rows(const OuterRows<double>&);
void linear_rows(const LinearRows<float>&);
void linear_rows(const LinearRows<double>&);
// The same for some panels of outputs and some packed steps of k, added to y unless they are the
// first. x is at the first of these steps, y at the first of these outputs. Steps that are done in
// order give the bits of all at once.
void linear_part(const LinearRows<float>&, Range panels, Range steps);
void linear_part(const LinearRows<double>&, Range panels, Range steps);
// The units of it, which are to run while it exists.
Units pack_units(PackLinear<float>&);
Units pack_units(PackLinear<double>&);
#if defined(__AVX512BF16__)
// Of factors that hold what bfloat16 holds; `pairs` is memory for pair_elements.
void outer_rows(const OuterRows<float>&, std::uint32_t* pairs);
void linear_rows(const LinearRows<BFloat16>&);
void linear_part(const LinearRows<BFloat16>&, Range panels, Range steps);
Units pack_units(PackLinear<BFloat16>&);
#endif

namespace {

// Factors that are rounded to T; `pairs` is memory for pair_elements where T has its own operands.
template <class T>
CONVNEST_INLINE void outer_rows_of(const OuterRows<Accumulate<T>>& o, std::uint32_t* pairs) {
    if constexpr (std::is_same<typename OperandOf<T>::type, Accumulate<T>>::value) {
        outer_rows(o);
    } else {
        outer_rows(o, pairs);
    }
}

}  // namespace
}  // namespace convnest::CONVNEST_ISA
