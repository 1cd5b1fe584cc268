// LayerNorm over rows, or its statistics alone; f = GELU(x) or x:
//
//     mean, rstd = 1/√(var + eps) of f      two passes in float (the mean first, then the centred
//                                           squares), over registers
//     RowOutput::norm            y = ẑ·γ + β,  ẑ = (f − mean)·rstd
//     RowOutput::norm_then_gelu  y = GELU(ẑ·γ + β)
//     RowOutput::norm_residual   y = s·r + ẑ·γ + β
//
// Reads x, r [rows, C] and γ, β, s [C]; writes mean and rstd [rows] (unless null) and y. A row
// belongs to 1 to 256 neighbouring threads (RowCut), which hold it in vectors of 8 channels.
#pragma once

#include "common/element.cuh"
#include "common/gelu.cuh"
#include "common/row_vector.cuh"

namespace convnest::cuda {

struct RowStatisticsParams {
    const void* x;  // [rows, C]
    float* mean;    // [rows] or null
    float* rstd;    // [rows] or null
    std::uint32_t rows;
    int C;
    float eps;
    void* y;                 // [rows, C]; unless RowOutput::statistics, as the two below
    const float* ln_weight;  // [C] or null
    const float* ln_bias;    // [C] or null
    // norm_residual alone
    const void* residual = nullptr;  // [rows, C]
    const float* scale = nullptr;    // [C] or null: 1
    RowCut cut = {0, 0};             // launch_row_statistics
};

enum class RowOutput { statistics, norm, norm_then_gelu, norm_residual };

constexpr int kHeldOctets = 5;

struct RowStatisticsShared {
    float sums[2][kThreads / kWarpSize];
};

// Sum over the threads of a row, the same in each of them, in a fixed order. Beyond a warp, one
// barrier.
__device__ __forceinline__ float row_sum(float value, float (&sums)[kThreads / kWarpSize],
                                         int threads_per_row) {
    value = lane_sum(value, threads_per_row);
    if (threads_per_row <= kWarpSize) return value;
    const int thread = threadIdx.x, warps = threads_per_row / kWarpSize;
    if (thread % kWarpSize == 0) store_shared(&sums[thread / kWarpSize], value);
    __syncthreads();
    const int first = thread / kWarpSize & ~(warps - 1);
    float sum = 0.f;
    for (int i = 0; i < warps; ++i) sum += load_shared<float>(&sums[first + i]);
    return sum;
}

// Blocks that are to share an SM.
template <class Element, RowOutput kOutput, bool kVector>
constexpr int kRowBlocks =
    !kVector                                                                        ? 1
    : sizeof(typename Element::Storage) == 2 && kOutput != RowOutput::norm_residual ? 3
                                                                                    : 2;

// kVector: C % 8 == 0, and x, y, the residual and the parameters are 16-byte aligned.
template <class Element, bool kGelu, RowOutput kOutput, bool kVector>
__global__ void __launch_bounds__(kThreads, kRowBlocks<Element, kOutput, kVector>)
    row_statistics_kernel(RowStatisticsParams p) {
    CONVNEST_SHARED_MEMORY(RowStatisticsShared, shared);
    using Storage = typename Element::Storage;
    using Vector = RowVector<Element, 8>;
    const int threads = p.cut.threads(), lane = threadIdx.x & (threads - 1);
    const std::uint32_t row = blockIdx.x * (kThreads >> p.cut.shift) + (threadIdx.x >> p.cut.shift);
    const std::size_t first = static_cast<std::size_t>(row) * p.C;
    const int width = row < p.rows ? p.C : 0;
    const auto channel_of = [&](int j) { return (lane + j * threads) * 8; };

    Vector raw[kHeldOctets], residual[kHeldOctets];
    float held[kHeldOctets][8];
    const auto read = [&](const void* tensor, int channel) {
        return Vector::template load<kVector>(static_cast<const Storage*>(tensor) + first + channel,
                                              width - channel);
    };
#pragma unroll
    for (int j = 0; j < kHeldOctets; ++j) {
        if (channel_of(j) >= width) break;
        raw[j] = read(p.x, channel_of(j));
        if (kOutput == RowOutput::norm_residual) residual[j] = read(p.residual, channel_of(j));
    }
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kHeldOctets; ++j) {
        if (channel_of(j) >= width) break;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float value = raw[j].get(i);
            held[j][i] = kGelu ? gelu_of<Element>(value) : value;
            sum += held[j][i];  // absent channels read as zero: GELU(0) = 0
        }
    }
    const float mean = row_sum(sum, shared.sums[0], threads) / p.C;

    sum = 0.f;
#pragma unroll
    for (int j = 0; j < kHeldOctets; ++j) {
        if (channel_of(j) >= width) break;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float centred = held[j][i] - mean;
            if (kVector || channel_of(j) + i < width) sum = fmaf(centred, centred, sum);
        }
    }
    const float variance = row_sum(sum, shared.sums[1], threads) / p.C;
    const float rstd = rsqrtf(variance + p.eps);
    if (lane == 0 && row < p.rows) {
        if (p.mean != nullptr) store_global(p.mean + row, mean);
        if (p.rstd != nullptr) store_global(p.rstd + row, rstd);
    }
    if constexpr (kOutput != RowOutput::statistics) {
#pragma unroll
        for (int j = 0; j < kHeldOctets; ++j) {
            const int channel = channel_of(j), channels = width - channel;
            if (channels <= 0) break;
            float gamma[8], beta[8], y[8];
            load_parameter<kVector>(p.ln_weight, channel, channels, 1.f, gamma);
            load_parameter<kVector>(p.ln_bias, channel, channels, 0.f, beta);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                y[i] = fmaf((held[j][i] - mean) * rstd, gamma[i], beta[i]);
                if (kOutput == RowOutput::norm_then_gelu) y[i] = gelu_of<Element>(y[i]);
            }
            if constexpr (kOutput == RowOutput::norm_residual) {
                float scale[8];
                load_parameter<kVector>(p.scale, channel, channels, 1.f, scale);
#pragma unroll
                for (int i = 0; i < 8; ++i) y[i] = fmaf(residual[j].get(i), scale[i], y[i]);
            }
            Vector::template store<kVector>(static_cast<Storage*>(p.y) + first + channel, y,
                                            channels);
        }
    }
}

// kVector: C and the tensors allow it.
template <class Element, bool kGelu, RowOutput kOutput, bool kVector>
void launch_row_statistics(const char* name, RowStatisticsParams p, void* stream) {
    p.cut = cut_row(p.C, 8, kHeldOctets, kThreads);
    const std::uint32_t rows_per_block = kThreads >> p.cut.shift;
    const bool vector = kVector && all_aligned(p.ln_weight, p.ln_bias, p.scale);
    run({.kernel = name,
         .grid = dim3((p.rows + rows_per_block - 1) / rows_per_block),
         .block = dim3(kThreads),
         .shared_bytes = sizeof(RowStatisticsShared),
         .stream = stream},
        vector ? row_statistics_kernel<Element, kGelu, kOutput, kVector>
               : row_statistics_kernel<Element, kGelu, kOutput, false>,
        p);
}

}  // namespace convnest::cuda
