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
// sums of dγ and dβ, [groups, 2, C] (unless null), for sum_partials().
//
// A row belongs to `threads_per_row` neighbouring threads, each with kOctets vectors of 8 channels;
// a group is such a set of threads, and takes every `groups`-th row. The number of groups is a
// function of the shape alone, so that results repeat bit by bit. With one vector to a thread, the
// next row's are on their way while this one is reduced; two leave no registers for that.
#pragma once

#include "common/gelu.cuh"
#include "common/row_statistics.cuh"

namespace convnest::cuda {

enum class NormOrder { gelu_then_norm, norm_then_gelu, norm, norm_residual };

constexpr int kRowThreads = 512;  // the most threads of a block
constexpr int kMostRowOctets = 2;
constexpr int kMostRowChannels = kRowThreads * kMostRowOctets * 8;

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
    float* partials;         // [groups, 2, C] or null: of dγ and dβ; norm_residual: 3, also ds
    std::uint32_t rows;
    int C;
    int threads_per_row;
    int groups;
    // norm_residual alone
    const float* scale = nullptr;  // [C] or null: 1
    void* dresidual = nullptr;     // [rows, C] or null
};

template <int kOctets>
struct LayerNormBwdShared {
    float2 sums[2][kRowThreads / kWarpSize];  // by parity of the row: one barrier is enough
    // γ of two vectors, thread-private, to spare registers
    float gamma[kOctets == 1 ? 1 : kOctets * 8][kRowThreads];
};

// kVector: C % 8 == 0 and dy, x, extra and dx are 16-byte aligned.
template <class Element, NormOrder kOrder, int kOctets, bool kVector>
__global__ void __launch_bounds__(kRowThreads) layernorm_bwd_kernel(LayerNormBwdArgs args) {
    CONVNEST_SHARED_MEMORY(LayerNormBwdShared<kOctets>, shared);
    const int lane = threadIdx.x % args.threads_per_row;
    const int sets = blockDim.x / args.threads_per_row, set = threadIdx.x / args.threads_per_row;
    const std::uint32_t group = blockIdx.x * sets + set;
    const int warps = args.threads_per_row / kWarpSize;

    using Storage = typename Element::Storage;
    using Vector = RowVector<Element>;
    constexpr bool kResidual = kOrder == NormOrder::norm_residual;
    struct Vectors {
        Vector dy[kOctets], x[kOctets], extra[kOctets];
        float mean, rstd;
    };
    const auto octet_of = [&](int o) { return lane + o * args.threads_per_row; };
    // Two vectors of float, or of single elements, are read again for the last step, from a nearer
    // cache, instead of held: there are no registers for them.
    constexpr bool kAgain = kOctets == 2 && (sizeof(Storage) == 4 || !kVector);
    const auto load = [&](Vectors& v, std::uint32_t row) {
        v = Vectors{};
        if (row >= args.rows) return;
        v.mean = load_global(args.mean + row);
        v.rstd = load_global(args.rstd + row);
        const std::size_t first = static_cast<std::size_t>(row) * args.C;
#pragma unroll
        for (int o = 0; o < kOctets; ++o) {
            const int channel = octet_of(o) * 8, channels = args.C - channel;
            if (channels <= 0) continue;
            const auto read = [&](const void* tensor) {
                return Vector::template load<kVector>(
                    static_cast<const Storage*>(tensor) + first + channel, channels);
            };
            v.dy[o] = read(args.dy);
            v.x[o] = read(args.x);
            if (args.extra != nullptr && (kResidual || !kAgain)) v.extra[o] = read(args.extra);
        }
    };
    float gamma_register[8], beta[kOctets][8], dgamma[kOctets][8], dbeta[kOctets][8];
    float dscale[kOctets][8];
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int channel = octet_of(o) * 8 + i;
            const bool exists = channel < args.C;
            const float gamma =
                exists && args.ln_weight ? load_global(args.ln_weight + channel) : 1.f;
            if (kOctets == 1) {
                gamma_register[i] = gamma;
            } else {
                store_shared(&shared.gamma[o * 8 + i][threadIdx.x], gamma);
            }
            beta[o][i] = exists && args.ln_bias ? load_global(args.ln_bias + channel) : 0.f;
            dgamma[o][i] = dbeta[o][i] = dscale[o][i] = 0.f;
        }
    }

    const auto gamma_of = [&](int o, int i) {
        return kOctets == 1 ? gamma_register[i]
                            : load_shared<float>(&shared.gamma[o * 8 + i][threadIdx.x]);
    };
    // Vectors of float take twice the registers.
    constexpr bool kAhead = kOctets == 1 && sizeof(Storage) == 2;
    Vectors next;
    if (kAhead) load(next, group);
    int parity = 0;
    // All groups of a block make the same number of turns: there is a barrier inside.
#pragma unroll 1
    for (std::uint32_t base = blockIdx.x * sets; base < args.rows; base += args.groups) {
        const std::uint32_t row = base + set;
        if (!kAhead) load(next, row);
        const Vectors v = next;
        if (kAhead) load(next, row + args.groups);

        float normal[kOctets][8], dy[kOctets][8], sum = 0.f, sum_normal = 0.f;
#pragma unroll
        for (int o = 0; o < kOctets; ++o) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const bool exists =
                    kVector ? octet_of(o) * 8 < args.C : octet_of(o) * 8 + i < args.C;
                const float gamma = gamma_of(o, i);
                float value = v.x[o].get(i);
                if (kOrder == NormOrder::gelu_then_norm) value = gelu_of<Element>(value);
                normal[o][i] = exists ? (value - v.mean) * v.rstd : 0.f;
                dy[o][i] = v.dy[o].get(i);
                if (kResidual) dscale[o][i] = fmaf(dy[o][i], v.extra[o].get(i), dscale[o][i]);
                if (kOrder == NormOrder::norm_then_gelu) {
                    dy[o][i] *= gelu_slope_of<Element>(fmaf(normal[o][i], gamma, beta[o][i]));
                }
                dgamma[o][i] = fmaf(dy[o][i], normal[o][i], dgamma[o][i]);
                dbeta[o][i] += dy[o][i];
                dy[o][i] *= gamma;
                sum += dy[o][i];
                sum_normal = fmaf(dy[o][i], normal[o][i], sum_normal);
            }
            // Here, where dy is at hand, and not with dx.
            const int channel = octet_of(o) * 8, channels = args.C - channel;
            if (kResidual && args.dresidual != nullptr && row < args.rows && channels > 0) {
                float dr[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const bool scaled = args.scale != nullptr && i < channels;
                    dr[i] = v.dy[o].get(i) * (scaled ? load_global(args.scale + channel + i) : 1.f);
                }
                Storage* out = static_cast<Storage*>(args.dresidual) +
                               static_cast<std::size_t>(row) * args.C + channel;
                Vector::template store<kVector>(out, dr, channels);
            }
        }
        sum = warp_sum(sum);
        sum_normal = warp_sum(sum_normal);
        if (warps > 1) {
            float2* sums = shared.sums[parity];
            if (lane % kWarpSize == 0) {
                store_shared(sums + threadIdx.x / kWarpSize, make_float2(sum, sum_normal));
            }
            __syncthreads();
            sum = sum_normal = 0.f;
            for (int i = 0; i < warps; ++i) {
                const auto part = load_shared<float2>(sums + set * warps + i);
                sum += part.x;
                sum_normal += part.y;
            }
            parity ^= 1;
        }
        const float m1 = sum / args.C, m2 = sum_normal / args.C;
        if (args.dx == nullptr || row >= args.rows) continue;
#pragma unroll
        for (int o = 0; o < kOctets; ++o) {
            const int channel = octet_of(o) * 8, channels = args.C - channel;
            if (channels <= 0) continue;
            const std::size_t first = static_cast<std::size_t>(row) * args.C;
            const auto read = [&](const void* tensor) {
                return Vector::template load<kVector>(
                    static_cast<const Storage*>(tensor) + first + channel, channels);
            };
            Vector x = v.x[o], extra = v.extra[o];
            if (kAgain) {
                if (kOrder == NormOrder::gelu_then_norm) x = read(args.x);
                if (!kResidual && args.extra != nullptr) extra = read(args.extra);
            }
            float dx[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float added = kResidual ? 0.f : extra.get(i);
                dx[i] = fmaf(dy[o][i] - fmaf(normal[o][i], m2, m1), v.rstd, added);
                if (kOrder == NormOrder::gelu_then_norm) {
                    dx[i] *= gelu_slope_of<Element>(x.get(i));
                }
            }
            Storage* out = static_cast<Storage*>(args.dx) + first;
            Vector::template store<kVector>(out + channel, dx, channels);
        }
    }

    if (args.partials == nullptr) return;
    constexpr int kSums = kResidual ? 3 : 2;
    float* out = args.partials + static_cast<std::size_t>(group) * kSums * args.C;
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int channel = octet_of(o) * 8 + i;
            if (channel >= args.C) continue;
            store_global(out + channel, dgamma[o][i]);
            store_global(out + args.C + channel, dbeta[o][i]);
            if (kResidual) store_global(out + 2 * args.C + channel, dscale[o][i]);
        }
    }
}

// How rows are dealt out: enough threads for a row, blocks of 256 threads or of one row, and two
// such blocks for each SM of the largest GPUs, however many this one has.
struct RowPlan {
    int octets, threads_per_row, sets, blocks, groups;
};

inline RowPlan plan_rows(std::uint32_t rows, int C) {
    constexpr int kBlocks = 2 * 148, kEnoughThreads = 256;
    RowPlan plan{};
    const int octets = ceil_div(C, 8);
    plan.octets = octets > kRowThreads ? 2 : 1;
    plan.threads_per_row = ceil_div(ceil_div(octets, plan.octets), kWarpSize) * kWarpSize;
    plan.sets = plan.threads_per_row < kEnoughThreads ? kEnoughThreads / plan.threads_per_row : 1;
    const std::uint32_t blocks = (rows + plan.sets - 1) / plan.sets;
    plan.blocks = blocks < kBlocks ? static_cast<int>(blocks) : kBlocks;
    plan.groups = plan.blocks * plan.sets;
    return plan;
}

template <class Element, NormOrder kOrder, bool kVector>
void launch_layernorm_bwd(const char* name, LayerNormBwdArgs args, void* stream) {
    const RowPlan plan = plan_rows(args.rows, args.C);
    args.threads_per_row = plan.threads_per_row;
    args.groups = plan.groups;
    run({.kernel = name,
         .grid = dim3(plan.blocks),
         .block = dim3(plan.threads_per_row * plan.sets),
         .shared_bytes =
             plan.octets == 1 ? sizeof(LayerNormBwdShared<1>) : sizeof(LayerNormBwdShared<2>),
         .stream = stream},
        plan.octets == 1 ? layernorm_bwd_kernel<Element, kOrder, 1, kVector>
                         : layernorm_bwd_kernel<Element, kOrder, 2, kVector>,
        args);
}

}  // namespace convnest::cuda
