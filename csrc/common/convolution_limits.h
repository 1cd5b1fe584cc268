// What the convolutions on CUDA devices support, the same for every stem.
#pragma once

#include "common/element_type.h"

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace convnest::cuda {

// The widest row that the backward holds in registers (ConvNeSt's own are 240 to 6912 wide).
constexpr int kMostChannels = 8192;

inline bool has_kernel_size(int kernel_size) {
    return kernel_size >= 3 && kernel_size <= 13 && kernel_size % 2 == 1;
}

// The band takes up to 9 taps of a 16-bit type; the rest runs on the FMA units.
inline bool on_tensor_cores(int kernel_size, ElementType type) {
    return type != ElementType::float32 && kernel_size <= 9;
}

inline std::size_t element_bytes(ElementType type) { return type == ElementType::float32 ? 4 : 2; }

inline void check_convolution(const char* stem, int N, int H, int W, int C, int kernel_size) {
    const auto refuse = [&](const std::string& what) {
        throw std::invalid_argument(std::string(stem) + ": " + what);
    };
    if (!has_kernel_size(kernel_size)) {
        refuse("kernel_size must be 3, 5, 7, 9, 11 or 13, got " + std::to_string(kernel_size));
    }
    // Pixels are counted in 32 bits, and a walk may step past the last image by a row of images.
    const std::int64_t pixels = static_cast<std::int64_t>(N) * H * W;
    if (pixels >= std::int64_t{1} << 31) {
        refuse("N·H·W must be below 2^31, got " + std::to_string(pixels));
    }
    if (C > kMostChannels) {
        refuse("C must be at most " + std::to_string(kMostChannels) + ", got " + std::to_string(C));
    }
}

}  // namespace convnest::cuda
