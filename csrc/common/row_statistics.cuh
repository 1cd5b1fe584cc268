// LayerNorm over rows, or its statistics alone; f = GELU(x) or x:
//
//     mean, rstd = 1/√(var + eps) of f      two passes in float (the mean first, then the centred
//                                           squares), over registers for C <= 8192
//     RowOutput::norm            y = ẑ·γ + β,  ẑ = (f − mean)·rstd
//     RowOutput::norm_then_gelu  y = GELU(ẑ·γ + β)
//     RowOutput::norm_residual   y = s·r + ẑ·γ + β
//
// Reads x, r [rows, C] and γ, β, s [C]; writes mean and rstd [rows] (unless null) and y. A row
// belongs to 32, 64, 128 or 256 neighbouring threads, so that each holds up to 4 vectors of 8
// channels; what is beyond is read anew in each pass.
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
    int threads_per_row;
    float eps;
    void* y;                 // [rows, C]; unless RowOutput::statistics, as the two below
    const float* ln_weight;  // [C] or null
    const float* ln_bias;    // [C] or null
    // norm_residual alone
    const void* residual = nullptr;  // [rows, C]
    const float* scale = nullptr;    // [C] or null: 1
};

enum class RowOutput { statistics, norm, norm_then_gelu, norm_residual };

struct RowStatisticsShared {
    float sums[2][kThreads / kWarpSize];
};

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int bits = kWarpSize / 2; bits > 0; bits /= 2) {
        value += __shfl_xor_sync(kFullWarp, value, bits);
    }
    return value;
}

// Sum over the threads of a row, the same in each of them, in a fixed order. One barrier.
__device__ __forceinline__ float row_sum(float value, float (&sums)[kThreads / kWarpSize],
                                         int threads_per_row) {
    const int thread = threadIdx.x, warps = threads_per_row / kWarpSize;
    value = warp_sum(value);
    if (warps == 1) return value;
    if (thread % kWarpSize == 0) store_shared(&sums[thread / kWarpSize], value);
    __syncthreads();
    const int first = thread / threads_per_row * warps;
    float sum = 0.f;
    for (int i = 0; i < warps; ++i) sum += load_shared<float>(&sums[first + i]);
    return sum;
}

// kVector: C % 8 == 0, x, y and the residual are 16-byte aligned.
template <class Element, bool kGelu, RowOutput kOutput, bool kVector>
__global__ void __launch_bounds__(kThreads, kVector ? 2 : 1)
    row_statistics_kernel(RowStatisticsParams p) {
    CONVNEST_SHARED_MEMORY(RowStatisticsShared, shared);
    constexpr int kHeld = 4;
    const int lane = threadIdx.x % p.threads_per_row;
    const int rows_per_block = kThreads / p.threads_per_row;
    const std::uint32_t row = blockIdx.x * rows_per_block + threadIdx.x / p.threads_per_row;
    const int octets = row < p.rows ? (p.C + 7) / 8 : 0;
    using Storage = typename Element::Storage;
    const Storage* x = static_cast<const Storage*>(p.x) + static_cast<std::size_t>(row) * p.C;

    const auto widen = [&](const RowVector<Element>& vector, float (&value)[8]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] = vector.get(i);
        if (kGelu) {
#pragma unroll
            for (int i = 0; i < 8; ++i) value[i] = gelu_of<Element>(value[i]);
        }
    };
    const auto read = [&](int octet) {
        return RowVector<Element>::template load<kVector>(x + octet * 8, p.C - octet * 8);
    };
    const auto squares = [&](const float (&value)[8], int octet, float mean) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float centred = value[i] - mean;
            if (kVector || octet * 8 + i < p.C) sum = fmaf(centred, centred, sum);
        }
        return sum;
    };

    RowVector<Element> raw[kHeld];
    float held[kHeld][8];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
        if (lane + j * p.threads_per_row < octets) raw[j] = read(lane + j * p.threads_per_row);
    }
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
        if (lane + j * p.threads_per_row >= octets) break;
        widen(raw[j], held[j]);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += held[j][i];  // absent channels read as zero: GELU(0) = 0
    }
    for (int octet = lane + kHeld * p.threads_per_row; octet < octets; octet += p.threads_per_row) {
        float value[8];
        widen(read(octet), value);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += value[i];
    }
    const float mean = row_sum(sum, shared.sums[0], p.threads_per_row) / p.C;

    sum = 0.f;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
        const int octet = lane + j * p.threads_per_row;
        if (octet >= octets) break;
        sum += squares(held[j], octet, mean);
    }
    for (int octet = lane + kHeld * p.threads_per_row; octet < octets; octet += p.threads_per_row) {
        float value[8];
        widen(read(octet), value);
        sum += squares(value, octet, mean);
    }
    const float variance = row_sum(sum, shared.sums[1], p.threads_per_row) / p.C;
    const float rstd = rsqrtf(variance + p.eps);
    if (lane == 0 && octets > 0) {
        if (p.mean != nullptr) store_global(p.mean + row, mean);
        if (p.rstd != nullptr) store_global(p.rstd + row, rstd);
    }
    if constexpr (kOutput != RowOutput::statistics) {
        const auto write = [&](const float (&value)[8], int octet) {
            const std::size_t offset = static_cast<std::size_t>(row) * p.C + octet * 8;
            const int channels = p.C - octet * 8;
            RowVector<Element> residual;
            if constexpr (kOutput == RowOutput::norm_residual) {
                residual = RowVector<Element>::template load<kVector>(
                    static_cast<const Storage*>(p.residual) + offset, channels);
            }
            float y[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int channel = octet * 8 + i;
                const bool exists = kVector || channel < p.C;
                const float gamma =
                    exists && p.ln_weight ? load_global(p.ln_weight + channel) : 1.f;
                const float beta = exists && p.ln_bias ? load_global(p.ln_bias + channel) : 0.f;
                y[i] = fmaf((value[i] - mean) * rstd, gamma, beta);
                if (kOutput == RowOutput::norm_then_gelu) y[i] = gelu_of<Element>(y[i]);
                if constexpr (kOutput == RowOutput::norm_residual) {
                    const float scale = exists && p.scale ? load_global(p.scale + channel) : 1.f;
                    y[i] = fmaf(residual.get(i), scale, y[i]);
                }
            }
            RowVector<Element>::template store<kVector>(static_cast<Storage*>(p.y) + offset, y,
                                                        channels);
        };
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
            const int octet = lane + j * p.threads_per_row;
            if (octet >= octets) break;
            write(held[j], octet);
        }
        for (int octet = lane + kHeld * p.threads_per_row; octet < octets;
             octet += p.threads_per_row) {
            float value[8];
            widen(read(octet), value);
            write(value, octet);
        }
    }
}

// Enough threads that a row fits in registers, a whole warp at least.
inline int statistics_threads_per_row(int C) {
    int threads = kWarpSize;
    while (threads < kThreads && threads * 32 < C) threads *= 2;
    return threads;
}

template <class Element, bool kGelu, RowOutput kOutput, bool kVector>
void launch_row_statistics(const char* name, RowStatisticsParams p, void* stream) {
    p.threads_per_row = statistics_threads_per_row(p.C);
    const std::uint32_t rows_per_block = kThreads / p.threads_per_row;
    run({.kernel = name,
         .grid = dim3((p.rows + rows_per_block - 1) / rows_per_block),
         .block = dim3(kThreads),
         .shared_bytes = sizeof(RowStatisticsShared),
         .stream = stream},
        row_statistics_kernel<Element, kGelu, kOutput, kVector>, p);
}

}  // namespace convnest::cuda
