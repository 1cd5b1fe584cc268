// The prologue of nested_conv's convolutions: z = (GELU(h) − mean)·rstd·γ + β, from a thread's 4
// pixels × 8 channels in NHWC registers to channel planes.
#pragma once

#include "common/gelu.cuh"
#include "common/planes.cuh"

namespace convnest::cuda {

// mean and rstd of a stage, on their way from global memory: [mean, rstd][row][quad] of 4 pixels.
struct StageStatistics {
    float4 quads[2][kStageRows][32];

    // Pixel i of this thread's quad. The two threads of a pixel share the work: one fetches the
    // mean, the other rstd; both wait for their copies and then for each other (__syncwarp).
    __device__ __forceinline__ void fetch(const Role& role, int i, const float* mean,
                                          const float* rstd, std::uint32_t pixel, bool exists) {
        float* quad = reinterpret_cast<float*>(&quads[role.half][role.row][role.quad]);
        async_copy_float(quad + i, (role.half ? rstd : mean) + pixel, exists);
    }
};

// The norm of 4 pixels as ẑ = g·scale + shift.
struct QuadNorm {
    float scale[4], shift[4];

    __device__ __forceinline__ QuadNorm(const StageStatistics& statistics, const Role& role) {
        const auto mean = load_shared<float4>(&statistics.quads[0][role.row][role.quad]);
        const auto rstd = load_shared<float4>(&statistics.quads[1][role.row][role.quad]);
        scale[0] = rstd.x, scale[1] = rstd.y, scale[2] = rstd.z, scale[3] = rstd.w;
        shift[0] = -mean.x * rstd.x, shift[1] = -mean.y * rstd.y;
        shift[2] = -mean.z * rstd.z, shift[3] = -mean.w * rstd.w;
    }
};

// γ and β of the block's channels.
struct BlockAffine {
    float gamma[kBlockChannels];
    float beta[kBlockChannels];

    __device__ __forceinline__ void fill(const float* ln_weight, const float* ln_bias, int channel0,
                                         int C, int thread) {
        if (thread >= kBlockChannels) return;
        const int channel = channel0 + thread;
        const auto value = [&](const float* parameter, float otherwise) {
            return parameter != nullptr && channel < C ? load_global(parameter + channel)
                                                       : otherwise;
        };
        store_shared(&gamma[thread], value(ln_weight, 1.f));
        store_shared(&beta[thread], value(ln_bias, 0.f));
    }
};

// Channels 2k, 2k + 1 of the quad: z to the planes, zero where no pixel is `present`; g as pairs.
template <class Element>
__device__ __forceinline__ void gelu_norm_pair(const Octet (&raw)[4], int k, const QuadNorm& norm,
                                               const BlockAffine& affine, unsigned present,
                                               const Role& role, Planes& planes,
                                               std::uint32_t (&g)[4]) {
    const auto gamma = load_shared<float2>(&affine.gamma[role.half * 8 + 2 * k]);
    const auto beta = load_shared<float2>(&affine.beta[role.half * 8 + 2 * k]);
    std::uint32_t low[2], high[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        float z_low[2], z_high[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int pixel = 2 * j + i;
            const float g_low = gelu_fast<Element>(Element::low(raw[pixel].pair[k]));
            const float g_high = gelu_fast<Element>(Element::high(raw[pixel].pair[k]));
            const float scale = norm.scale[pixel], shift = norm.shift[pixel];
            g[pixel] = Element::pack(g_low, g_high);
            z_low[i] = fmaf(fmaf(g_low, scale, shift), gamma.x, beta.x);
            z_high[i] = fmaf(fmaf(g_high, scale, shift), gamma.y, beta.y);
        }
        const std::uint32_t mask = pixel_mask(present, j);
        low[j] = Element::pack(z_low[0], z_low[1]) & mask;
        high[j] = Element::pack(z_high[0], z_high[1]) & mask;
    }
    store_shared(planes.bytes + role.cell(2 * k), make_uint2(low[0], low[1]));
    store_shared(planes.bytes + role.cell(2 * k + 1), make_uint2(high[0], high[1]));
}

}  // namespace convnest::cuda
