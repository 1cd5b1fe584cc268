// What the launches of the row operators share: checks, the choice of the instance.
#pragma once

#include <stdexcept>
#include <string>

#include "common/instances.cuh"
#include "common/layernorm_bwd.cuh"
#include "common/row_statistics.cuh"
#include "common/sum_partials.cuh"

namespace convnest::cuda {

// Throws std::invalid_argument for sizes that the row kernels do not take.
inline void check_rows(const char* name, std::int64_t rows, int C) {
    const auto refuse = [&](const std::string& what) {
        throw std::invalid_argument(name + (": " + what));
    };
    if (rows >= std::int64_t{1} << 31) {
        refuse("rows must be below 2^31, got " + std::to_string(rows));
    }
    if (C > kMostRowChannels) {
        refuse("C must be at most " + std::to_string(kMostRowChannels) + ", got " +
               std::to_string(C));
    }
}

}  // namespace convnest::cuda
