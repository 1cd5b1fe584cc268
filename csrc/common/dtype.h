// Storage types, shared by host and device: what the tensors hold. Arithmetic is in `Accumulate`.
#pragma once

#include <cstdint>

namespace convnest {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// 16-bit floats are bits in memory; only loads and stores convert them.
struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

// The type a kernel computes in, and that of parameters, statistics and parameter gradients.
template <class T>
struct AccumulateOf {
    using type = float;
};
template <>
struct AccumulateOf<double> {
    using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

}  // namespace convnest
