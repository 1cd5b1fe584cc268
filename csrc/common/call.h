// What the drivers of the CPU stems share: the element type of a call, and the memory of it.
#pragma once

#include "dtype.h"
#include "parallel.h"

namespace convnest::CONVNEST_ISA {
namespace {

template <class T>
struct TypeTag {
    using type = T;
};

// f(TypeTag<T>) for the type that `dtype` names. Builds with a sanitizer, which take a compiler
// minutes, keep to float32.
template <class F>
auto with_type([[maybe_unused]] DType dtype, F&& f) {
#if !defined(CONVNEST_FLOAT32_ONLY)
    switch (dtype) {
        case DType::kFloat64: return f(TypeTag<double>{});
        case DType::kBFloat16: return f(TypeTag<BFloat16>{});
        case DType::kFloat16: return f(TypeTag<Float16>{});
        case DType::kFloat32: break;
    }
#endif
    return f(TypeTag<float>{});
}

// The bytes that take(carver) takes.
template <class F>
std::size_t bytes_of(F&& take) {
    Carver counter(nullptr);
    take(counter);
    return counter.used();
}

// The memory of one call that take(carver) takes, and has taken once this exists.
class CarvedScratch {
  public:
    template <class F>
    explicit CarvedScratch(F&& take) : memory_(bytes_of(take)) {
        Carver carver(memory_.data());
        take(carver);
    }

  private:
    CallScratch memory_;
};

}  // namespace
}  // namespace convnest::CONVNEST_ISA
