// out[i] = Σ_g partials[g·stride + i], g < groups, i < count, always in the same order.
//
// A block takes 32 neighbouring i; its 16 rows of threads each sum every 16th group, and the first
// of them adds the 16 sums. Reads partials, writes out.
#pragma once

#include "common/memory.cuh"

namespace convnest::cuda {

constexpr int kSumRows = 16;

struct SumPartialsArgs {
    const float* partials;
    float* out;
    std::size_t stride;
    int groups, count;
};

struct SumPartialsShared {
    float sums[kSumRows][kWarpSize];
};

template <int kRows>
__global__ void __launch_bounds__(kRows* kWarpSize) sum_partials_kernel(SumPartialsArgs args) {
    CONVNEST_SHARED_MEMORY(SumPartialsShared, shared);
    const int lane = threadIdx.x % kWarpSize, row = threadIdx.x / kWarpSize;
    const int i = blockIdx.x * kWarpSize + lane;
    float sum = 0.f;
    if (i < args.count) {
#pragma unroll 4
        for (int g = row; g < args.groups; g += kRows) {
            sum += load_global(args.partials + g * args.stride + i);
        }
    }
    store_shared(&shared.sums[row][lane], sum);
    __syncthreads();
    if (row != 0 || i >= args.count) return;
    for (int r = 1; r < kRows; ++r) sum += load_shared<float>(&shared.sums[r][lane]);
    store_global(args.out + i, sum);
}

inline void launch_sum_partials(const SumPartialsArgs& args, void* stream) {
    run({.kernel = "sum_partials_kernel",
         .grid = dim3((args.count + kWarpSize - 1) / kWarpSize),
         .block = dim3(kWarpSize * kSumRows),
         .shared_bytes = sizeof(SumPartialsShared),
         .stream = stream},
        sum_partials_kernel<kSumRows>, args);
}

}  // namespace convnest::cuda
