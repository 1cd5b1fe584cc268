// From numbers known at run time to template instances, the same way for every stem.
#pragma once

#include <type_traits>

#include "common/convolution_limits.h"
#include "common/element.cuh"

namespace convnest::cuda {

// f(Element{}) for the type.
template <class Function>
void with_element(ElementType type, const Function& f) {
    switch (type) {
        case ElementType::float32: return f(Float32{});
        case ElementType::bfloat16: return f(BFloat16{});
        case ElementType::float16: return f(Float16{});
    }
}

// The same for the types of 16 bits.
template <class Function>
void with_half(ElementType type, const Function& f) {
    type == ElementType::bfloat16 ? f(BFloat16{}) : f(Float16{});
}

// f(std::bool_constant): whether rows and tensors allow 16-byte accesses.
template <class Function>
void with_vector(bool vector, const Function& f) {
    vector ? f(std::true_type{}) : f(std::false_type{});
}

// f(std::integral_constant<int, K>) for the kernel sizes of the tensor cores.
template <class Function>
void with_band_size(int kernel_size, const Function& f) {
    switch (kernel_size) {
        case 3: return f(std::integral_constant<int, 3>{});
        case 5: return f(std::integral_constant<int, 5>{});
        case 7: return f(std::integral_constant<int, 7>{});
        default: return f(std::integral_constant<int, 9>{});
    }
}

// The way that a convolution goes: small(Element{}) where the image is the tile, 16 bits alone;
// band(Element{}, K, std::bool_constant<is_vector>) on the tensor cores; else fma(Element{}).
template <class Small, class Band, class Fma>
void with_way(ElementType type, int kernel_size, bool is_small, bool is_vector, const Small& small,
              const Band& band, const Fma& fma) {
    if (type == ElementType::float32) return fma(Float32{});
    with_half(type, [&](auto element) {
        if (is_small) {
            small(element);
        } else if (on_tensor_cores(kernel_size, type)) {
            with_band_size(kernel_size, [&](auto K) {
                with_vector(is_vector, [&](auto vector) { band(element, K, vector); });
            });
        } else {
            fma(element);
        }
    });
}

}  // namespace convnest::cuda
