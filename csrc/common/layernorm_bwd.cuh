// The backward of a LayerNorm beside a GELU or a residual sum over rows, in one pass:
//
//     kGeluThenNorm   y = LN(GELU(x)):  g = GELU(x), ẑ = (g − mean)·rstd, a = dy·γ
//                     dx = GELU'(x) ⊙ ((a − m1 − ẑ·m2)·rstd [+ extra]),   m1 = mean(a), m2 =
//                     mean(a·ẑ)
//     kNormThenGelu   y = GELU(LN(x)):  ẑ = (x − mean)·rstd, dy ← dy ⊙ GELU'(γẑ + β), then
//                     dx = (a − m1 − ẑ·m2)·rstd [+ extra]
//     kNorm           y = LN(x):        dx as in kNormThenGelu, without the GELU
//     kNormResidual   y = s·r + LN(x):  dx as in kNorm; dr = s·dy, ds = Σ_rows dy·r
//     all             dγ = Σ_rows dy·ẑ,  dβ = Σ_rows dy
//
// Reads dy, x, extra [rows, C] (extra may be null), mean, rstd; writes dx (unless null) and partial
// sums of dγ and dβ, [blocks, 2, C] (unless null), for sum_partials().
//
// A row belongs to 1 to 512 neighbouring threads (RowCut), which hold it in vectors of 4 channels
// and their parameters' sums with it: all that a row costs beside its channels is paid for up to 20
// of them. A block takes every `gridDim.x`-th set of rows and adds up its threads' sums at the end.
// The number of blocks is a function of the shape alone, so that results repeat bit by bit.
#pragma once

#include "common/gelu.cuh"
#include "common/row_statistics.cuh"

namespace convnest::cuda {

enum class NormOrder { gelu_then_norm, norm_then_gelu, norm, norm_residual };

constexpr int kMostRowThreads = 512;
constexpr int kMostRowChannels = 8192;

// Vectors that a thread can hold in 128 registers.
template <class Element, NormOrder kOrder>
constexpr int kHeldQuads =
    sizeof(typename Element::Storage) == 2 &&
            (kOrder == NormOrder::gelu_then_norm || kOrder == NormOrder::norm)
        ? 5
        : 4;
static_assert(kMostRowChannels <= kMostRowThreads * 4 * 4);

struct LayerNormBwdArgs {
    const void* dy;          // [rows, C]
    const void* x;           // [rows, C]
    const void* extra;       // [rows, C] or null: added to the gradient of the norm's input;
                             // norm_residual: the residual r, null where ds is not wanted
    const float* mean;       // [rows]
    const float* rstd;       // [rows]
    const float* ln_weight;  // [C] or null
    const float* ln_bias;    // [C] or null; norm_then_gelu only
    void* dx;                // [rows, C] or null
    float* partials;         // [blocks, 2, C] or null: of dγ and dβ; norm_residual: 3, also ds
    std::uint32_t rows;
    int C;
    // norm_residual alone
    const float* scale = nullptr;  // [C] or null: 1
    void* dresidual = nullptr;     // [rows, C] or null
    RowCut cut = {0, 0};           // launch_layernorm_bwd
};

struct LayerNormBwdShared {
    float2 rows[2][kMostRowThreads / kWarpSize];  // by parity of the turn: one barrier is enough
    float4 sums[1];                               // [kHeld][threads of the block]
};

// kVector: C % 4 == 0, and dy, x, extra, dx and the parameters are 16-byte aligned.
template <class Element, NormOrder kOrder, bool kVector>
__global__ void __launch_bounds__(kMostRowThreads) layernorm_bwd_kernel(LayerNormBwdArgs args) {
    CONVNEST_SHARED_MEMORY(LayerNormBwdShared, shared);
    using Storage = typename Element::Storage;
    using Vector = RowVector<Element, 4>;
    constexpr int kHeld = kHeldQuads<Element, kOrder>;
    constexpr bool kResidual = kOrder == NormOrder::norm_residual;
    // What is held in registers until a row's sums are known; the rest is cheaper to make again. Of
    // floats x and dy are read again, from a nearer cache.
    constexpr bool kReadsAgain =
        sizeof(Storage) == 4 && (kResidual || (kOrder == NormOrder::norm_then_gelu && !kVector));
    constexpr bool kHoldsNormal = kOrder == NormOrder::gelu_then_norm ||
                                  (kOrder == NormOrder::norm_then_gelu && !kVector && !kReadsAgain);
    constexpr bool kHoldsA = kOrder == NormOrder::norm_then_gelu;
    // GELU and its slope at once; the slope waits where x did, in 16 bits as fp16, whose rounding
    // would tell in fp16 alone.
    constexpr bool kKeepsSlope =
        kOrder == NormOrder::gelu_then_norm && !std::is_same_v<Element, Float16>;
    using Kept = std::conditional_t<std::is_same_v<Element, Float32>, Float32, Float16>;
    constexpr bool kReadsAhead =
        kResidual && kVector && sizeof(Storage) == 2;  // the residual, with x and dy
    const int threads = args.cut.threads();
    int lane = threadIdx.x & (threads - 1);
    const int sets = blockDim.x >> args.cut.shift, set = threadIdx.x >> args.cut.shift;
    const int warps = threads / kWarpSize;  // 0 and 1: a row lies in a warp
    const auto channel_of = [&](int j) { return (lane + j * threads) * 4; };

    float dgamma[kHeld][4] = {}, dbeta[kHeld][4] = {}, dscale[kHeld][4] = {};
    int parity = 0;
    // All rows of a block make the same number of turns: there is a barrier inside.
#pragma unroll 1
    for (std::uint32_t base = blockIdx.x * sets; base < args.rows; base += gridDim.x * sets) {
        const std::uint32_t row = base + set;
        const int width = row < args.rows ? args.C : 0;
        const std::size_t first = static_cast<std::size_t>(row) * args.C;
        const auto read = [&](const void* tensor, int j) {
            return Vector::template load<kVector>(
                static_cast<const Storage*>(tensor) + first + channel_of(j), width - channel_of(j));
        };
        Vector x[kHeld], dy[kHeld], extra[kHeld];
        float mean = 0.f, rstd = 0.f;
        if (width > 0) mean = load_global(args.mean + row), rstd = load_global(args.rstd + row);
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
            if (channel_of(j) >= width) break;
            x[j] = read(args.x, j), dy[j] = read(args.dy, j);
            if (kReadsAhead && args.extra != nullptr) extra[j] = read(args.extra, j);
        }

        float slope[4] = {};
        const auto normal_of = [&](int j, int i) {
            const float value = x[j].get(i);
            if constexpr (kKeepsSlope) {
                const GeluAndSlope both = gelu_and_slope<Element>(value);
                slope[i] = both.slope;
                return (both.value - mean) * rstd;
            }
            return ((kOrder == NormOrder::gelu_then_norm ? gelu_of<Element>(value) : value) -
                    mean) *
                   rstd;
        };
        float normal[kHeld][4], a[kHeld][4], sum = 0.f, sum_normal = 0.f;
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
            const int channel = channel_of(j), channels = width - channel;
            if (channels <= 0) break;
            float gamma[4], beta[4], scale[4];
            load_parameter<kVector>(args.ln_weight, channel, channels, 1.f, gamma);
            if (kOrder == NormOrder::norm_then_gelu) {
                load_parameter<kVector>(args.ln_bias, channel, channels, 0.f, beta);
            }
            if (kResidual) load_parameter<kVector>(args.scale, channel, channels, 1.f, scale);
            if (kResidual && !kReadsAhead && args.extra != nullptr) extra[j] = read(args.extra, j);
            float dresidual[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float gradient = dy[j].get(i);
                normal[j][i] = normal_of(j, i);
                if (kResidual) {
                    dresidual[i] = gradient * scale[i];
                    if (args.extra != nullptr) {
                        dscale[j][i] = fmaf(gradient, extra[j].get(i), dscale[j][i]);
                    }
                }
                if (kOrder == NormOrder::norm_then_gelu) {
                    gradient *= gelu_slope_of<Element>(fmaf(normal[j][i], gamma[i], beta[i]));
                }
                // Of a channel that does not exist dy is zero, and so is all that follows.
                dgamma[j][i] = fmaf(gradient, normal[j][i], dgamma[j][i]);
                dbeta[j][i] += gradient;
                a[j][i] = gradient * gamma[i];
                sum += a[j][i];
                sum_normal = fmaf(a[j][i], normal[j][i], sum_normal);
            }
            if constexpr (kKeepsSlope) x[j].template set<Kept>(slope);
            if (kResidual && args.dresidual != nullptr) {
                Vector::template store<kVector>(
                    static_cast<Storage*>(args.dresidual) + first + channel, dresidual, channels);
            }
        }
        sum = lane_sum(sum, threads);
        sum_normal = lane_sum(sum_normal, threads);
        if (warps > 1) {
            float2* sums = shared.rows[parity];
            if (threadIdx.x % kWarpSize == 0) {
                store_shared(sums + threadIdx.x / kWarpSize, make_float2(sum, sum_normal));
            }
            __syncthreads();
            sum = sum_normal = 0.f;
            for (int i = 0; i < warps; ++i) {
                const auto part = load_shared<float2>(sums + set * warps + i);
                sum += part.x, sum_normal += part.y;
            }
            parity ^= 1;
        }
        if (args.dx == nullptr) continue;
        // (a − m1 − ẑ·m2)·rstd = a·rstd + ẑ·along + level
        const float each = -rstd / args.C, level = sum * each, along = sum_normal * each;
        if (!kHoldsNormal) {
            mean = bits_to_float(recompute_from(static_cast<int>(float_to_bits(mean))));
        }
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
            if (!kVector) lane = recompute_from(lane);
            if (channel_of(j) >= width) break;
            if (!kResidual && args.extra != nullptr) extra[j] = read(args.extra, j);
            if (kReadsAgain) x[j] = read(args.x, j);
            if (kReadsAgain && !kHoldsA) dy[j] = read(args.dy, j);
            float gamma[4], dx[4];
            if (!kHoldsA) {
                load_parameter<kVector>(args.ln_weight, channel_of(j), width - channel_of(j), 1.f,
                                        gamma);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool added = !kResidual && args.extra != nullptr;
                if (!kHoldsNormal) normal[j][i] = normal_of(j, i);
                if (!kHoldsA) a[j][i] = dy[j].get(i) * gamma[i];
                const float from = added ? level + extra[j].get(i) : level;
                dx[i] = fmaf(a[j][i], rstd, fmaf(normal[j][i], along, from));
                if constexpr (kKeepsSlope) {
                    dx[i] *= x[j].template get<Kept>(i);
                } else if (kOrder == NormOrder::gelu_then_norm) {
                    dx[i] *= gelu_slope_of<Element>(x[j].get(i));
                }
            }
            Vector::template store<kVector>(static_cast<Storage*>(args.dx) + first + channel_of(j),
                                            dx, width - channel_of(j));
        }
    }

    if (args.partials == nullptr) return;
    constexpr int kSums = kResidual ? 3 : 2;
    const auto add_up = [&](const float (&value)[kHeld][4], int which) {
        float* out =
            args.partials + (static_cast<std::size_t>(blockIdx.x) * kSums + which) * args.C;
        __syncthreads();  // the sums before these have been read
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
            store_shared(&shared.sums[j * blockDim.x + threadIdx.x],
                         make_float4(value[j][0], value[j][1], value[j][2], value[j][3]));
        }
        __syncthreads();
        for (int vector = threadIdx.x; vector * 4 < args.C; vector += blockDim.x) {
            const int at = (vector >> args.cut.shift) * blockDim.x + (vector & (threads - 1));
            auto sum = load_shared<float4>(&shared.sums[at]);
            for (int other = 1; other < sets; ++other) {
                const auto part = load_shared<float4>(&shared.sums[at + other * threads]);
                sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
            }
            const float total[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (vector * 4 + i < args.C) store_global(out + vector * 4 + i, total[i]);
            }
        }
    };
    add_up(dgamma, 0);
    add_up(dbeta, 1);
    if (kResidual) add_up(dscale, 2);
}

// Blocks, each with partial sums of its own: twice as many as an H100 or H200 runs at once (132
// SMs, two blocks each); more of them would end more evenly elsewhere, and write more sums.
inline int row_blocks(std::uint32_t rows) {
    constexpr std::uint32_t kBlocks = 4 * 132;
    return static_cast<int>(rows < kBlocks ? rows : kBlocks);
}

// kVector: C and the tensors allow it.
template <class Element, NormOrder kOrder, bool kVector>
void launch_layernorm_bwd(const char* name, LayerNormBwdArgs args, void* stream) {
    constexpr int kHeld = kHeldQuads<Element, kOrder>, kEnoughThreads = 256;
    args.cut = cut_row(args.C, 4, kHeld, kMostRowThreads);
    const int threads = args.cut.threads() > kEnoughThreads ? args.cut.threads() : kEnoughThreads;
    const bool vector = kVector && all_aligned(args.ln_weight, args.ln_bias, args.scale);
    run({.kernel = name,
         .grid = dim3(row_blocks(args.rows)),
         .block = dim3(threads),
         .shared_bytes = offsetof(LayerNormBwdShared, sums) + sizeof(float4) * kHeld * threads,
         .stream = stream},
        vector ? layernorm_bwd_kernel<Element, kOrder, kVector>
               : layernorm_bwd_kernel<Element, kOrder, false>,
        args);
}

}  // namespace convnest::cuda
