// The instances of the small maps' kernels, forward and backward.
#pragma once

#include <type_traits>

#include "common/small_map.cuh"

namespace convnest::cuda {

// f(std::integral_constant<int, K>, std::integral_constant<int, side>): maps of 7×7 with a 7×7
// kernel, the last stage of every model at 224², have an instance with every index known.
template <class Function>
void with_map_size(int kernel_size, int height, int width, const Function& f) {
    constexpr std::integral_constant<int, kMapSide> side;
    switch (kernel_size) {
        case 3: return f(std::integral_constant<int, 3>{}, side);
        case 5: return f(std::integral_constant<int, 5>{}, side);
        case 7:
            if (height == 7 && width == 7) {
                constexpr std::integral_constant<int, 7> seven;
                return f(seven, seven);
            }
            return f(std::integral_constant<int, 7>{}, side);
        case 9: return f(std::integral_constant<int, 9>{}, side);
        case 11: return f(std::integral_constant<int, 11>{}, side);
        default: return f(std::integral_constant<int, 13>{}, side);
    }
}

}  // namespace convnest::cuda
