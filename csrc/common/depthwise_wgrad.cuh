// Weight and bias gradients of a depthwise K×K convolution of bf16 or fp16 on the tensor cores:
//
//     dw[c, ky, kx] = Σ z[n, y + ky − R, x + kx − R, c] · dy[n, y, x, c],    db[c] = Σ dy
//     z = x, or with kGeluNorm (GELU(x) − mean)·rstd·γ + β; 0 outside the image
//
// The band's product contracted the other way: over the 16 tiles m of a virtual row,
//
//     Q_ky[j, n] += Σ_m z[8m − 4 + j] · dy[8m + n]        and kx = j − n − (4 − R)
//
// with both operands from the planes by ldmatrix.trans. The K accumulators Q_ky stay in registers
// over all items of a block, and their diagonals are summed once, at the end. db is one more
// product, with a matrix of ones.
//
// Reads x (halo of R), dy, mean, rstd; writes partial sums: dw [groups, C, K·K] and db [groups, C],
// a group being the items that one block takes, in order; sum_partials() adds them, in order. The
// number of groups is a function of the shape alone, so that results repeat bit by bit.
#pragma once

#include "common/band.cuh"
#include "common/gelu_norm.cuh"

namespace convnest::cuda {

struct DepthwiseWgradArgs {
    const std::uint16_t* x;   // [N, H, W, C]
    const std::uint16_t* dy;  // [N, H, W, C]
    const float* mean;        // [N, H, W]; kGeluNorm only, as the three below
    const float* rstd;        // [N, H, W]
    const float* ln_weight;   // [C] or null
    const float* ln_bias;     // [C] or null
    float* dweight;           // [groups, C, K·K]
    float* dbias;             // [groups, C] or null
    int C;
    Canvas canvas;
    std::uint32_t pixel_count;  // N·H·W
    int channel_blocks;
    int groups;
};

// dy's rows: those that the 4 rows of z of a stage meet, in a ring.
template <int K>
constexpr int kGradientRows = kStageRows + K / 2 * 2;

// db of the block's channels by output n of a tile; the rows of the product with ones are all the
// same, and its first, in lanes 0–3, is kept. In shared memory to spare registers.
struct BiasSums {
    float2 pairs[kBlockChannels][4];

    __device__ __forceinline__ void clear(int thread) {
        if (thread < kBlockChannels * 4) store_shared(&pairs[0][0] + thread, make_float2(0.f, 0.f));
    }
    __device__ __forceinline__ void add(const FragmentC& sum, int channel, int lane) {
        if (lane >= 4) return;
        const auto before = load_shared<float2>(&pairs[channel][lane]);
        store_shared(&pairs[channel][lane], make_float2(before.x + sum[0], before.y + sum[1]));
    }
};

template <int K>
struct DepthwiseWgradShared {
    union {
        struct {
            Planes z;
            unsigned char dy[kGradientRows<K> * kPlaneRowBytes];
        };
        float sums[kBlockChannels * K][16][8];  // at the end: Q
    };
    StageStatistics statistics;
    BlockAffine affine;
    QuadOffsets offsets;
    BiasSums bias;
};
// Two blocks, and 1 KB of the system's for each, share the 164 KB of sm_80.
static_assert(sizeof(DepthwiseWgradShared<7>) <= 81 * 1024);

// A lane's ldmatrix row addresses, transposed: of z's window, matrices in the order of fragment A
// (columns 0–7, 8–15 of tiles 0–7, then of tiles 8–15) ...
__device__ __forceinline__ int window_address_transposed(int channel, int lane) {
    const int tile = (lane & 7) + (lane >> 4) * 8;
    return plane_of(channel) * kPlaneBytes + (tile + (lane >> 3 & 1)) * 16;
}

// ... and of dy, two rows at once, each in the order of fragment B (tiles 0–7, 8–15).
__device__ __forceinline__ int gradient_address(int channel, int lane) {
    const int tile = (lane & 7) + (lane >> 3 & 1) * 8;
    return (lane >> 4) * kPlaneRowBytes + plane_of(channel) * kPlaneBytes + tile * 16;
}

template <class Element>
__device__ __forceinline__ std::uint32_t pair_of_ones() {
    return Element::pack(1.f, 1.f);
}

// Channel `channel`'s share of a stage: rows z[0..3], meeting dy rows −R .. 3 + R. `oldest`: ring
// slot of dy row −R, an even number.
template <class Element, int K>
__device__ __forceinline__ void correlate_stage(Ring<K>& sums, BiasSums& bias_sums,
                                                const unsigned char* z, const unsigned char* dy,
                                                int oldest, int channel, int lane) {
    constexpr int kRows = kGradientRows<K>;
    const unsigned char* windows = z + window_address_transposed(channel, lane);
    const unsigned char* gradients = dy + gradient_address(channel, lane);
    const std::uint32_t one = pair_of_ones<Element>();
    const FragmentA ones = {one, one, one, one};
    FragmentC bias_sum = {0.f, 0.f, 0.f, 0.f};
    FragmentB gradient[kRows];
    const auto load = [&](int row) {  // and row + 1; row is even
        const int slot = oldest + row < kRows ? oldest + row : oldest + row - kRows;
        std::uint32_t r[4];
        load_matrices<true>(r, gradients + slot * kPlaneRowBytes);
        gradient[row][0] = r[0], gradient[row][1] = r[1];
        gradient[row + 1][0] = r[2], gradient[row + 1][1] = r[3];
    };
#pragma unroll
    for (int row = 0; row < K - 1; row += 2) load(row);
#pragma unroll
    for (int row = 0; row < kStageRows; ++row) {
        if (row % 2 == 0) load(row + K - 1);
        FragmentA window;
        load_matrices<true>(window, windows + row * kPlaneRowBytes);
#pragma unroll
        for (int ky = 0; ky < K; ++ky) {
            mma<Element>(sums[ky], window, gradient[row + K - 1 - ky], sums[ky]);
        }
        // Each row of dy enters the ring once, and is counted then.
        mma<Element>(bias_sum, ones, gradient[row + K - 1], bias_sum);
    }
    bias_sums.add(bias_sum, channel, lane);
}

// kVector: 16-byte accesses; C % 8 == 0, x and dy are 16-byte aligned.
template <class Element, int K, bool kGeluNorm, bool kVector>
__global__ void __launch_bounds__(kThreads, kMinBlocks<K, kVector>)
    depthwise_wgrad_kernel(DepthwiseWgradArgs args) {
    CONVNEST_SHARED_MEMORY(DepthwiseWgradShared<K>, shared);
    constexpr int R = K / 2, kRows = kGradientRows<K>;
    const Canvas& canvas = args.canvas;
    const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
    const int channel0 = blockIdx.x % args.channel_blocks * kBlockChannels;
    const int group = blockIdx.x / args.channel_blocks;
    const Role role(thread);
    const int octet0 = channel0 + role.half * 8, channels = args.C - octet0;
    const std::uint32_t row_bytes = 2 * static_cast<std::uint32_t>(args.C);

    if (kGeluNorm) shared.affine.fill(args.ln_weight, args.ln_bias, channel0, args.C, thread);
    clear_zero_blocks(shared.z, thread);
    // The last block of a plane of dy has 4 pixels beyond the canvas.
    for (int i = thread; i < kRows * kBlockChannels; i += kThreads) {
        store_shared(shared.dy + i * kPlaneBytes + 15 * 16, make_uint4(0, 0, 0, 0));
    }
    Ring<K> sums[kWarpChannels];
    const FragmentC zero = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int c = 0; c < kWarpChannels; ++c) begin<K>(sums[c], zero);
    shared.bias.clear(thread);
    // A thread's cells of dy: pixel v at position v, a lead of 4 pixels less than in z; quad 0,
    // which lies left of the canvas, has none.
    const auto gradient_cell = [&](int slot, int i) {
        return shared.dy + slot * kPlaneRowBytes + (2 * i + role.half) * kPlaneBytes +
               role.quad * 8 - kLeadPixels * 2;
    };

#pragma unroll 1
    for (int index = group; index < canvas.items; index += args.groups) {
        Item item = item_of(canvas, index);
        // The first rows of z lie above the outputs, in a gap if the image starts here: dy's ring
        // is then filled from the item's first row on.
        item.top_y -= R - (item.first - item.start);
        item.start = item.first - R;
        const PixelQuad quad(canvas, item, role.quad * 4 - kLeadPixels);
        // Bits 0–3: readable pixels, 4–7: outputs, 8: this thread's channels exist
        const unsigned pixels = quad.readable | (channels > 0 ? quad.owned << 4 | 1u << 8 : 0u);
        shared.offsets.store(quad, role);
        __syncthreads();

        RowWalk<R> walk(canvas, item, role.row);  // of z; that of dy is R rows ahead
        Octet x[4] = {};                          // with the norm: the next stage's, on its way
        unsigned present;
        const auto load_x = [&] {
            present = walk.inside(canvas) ? pixels & 15 : 0;
            std::uint32_t offset[4];
            shared.offsets.load(offset, role);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const std::uint32_t pixel = walk.pixel + offset[i];
                if (pixel >= args.pixel_count) present &= ~(1u << i);
                const bool exists = present >> i & 1;
                if (exists && (pixels >> 8)) {
                    x[i] =
                        load_octet<kVector>(at_pixel(args.x + octet0, pixel, row_bytes), channels);
                }
                if (kGeluNorm) {
                    shared.statistics.fetch(role, i, args.mean, args.rstd, pixel, exists);
                }
            }
            if (kGeluNorm) async_copy_commit();
        };
        // dy has no registers to wait in: it is read and used in a fill, with the norm in between.
        const auto load_dy = [&](Octet(&dy)[4], int row) {
            RowWalk<R> ahead = walk;
            ahead.advance(canvas, R);
            const unsigned owned =
                ahead.inside(canvas) && row + R + role.row < item.end ? pixels >> 4 & 15 : 0;
            std::uint32_t offset[4];
            shared.offsets.load(offset, role);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const std::uint32_t pixel = ahead.pixel + offset[i];
                dy[i] = Octet{};
                if ((owned >> i & 1) && pixel < args.pixel_count) {
                    dy[i] =
                        load_octet<kVector>(at_pixel(args.dy + octet0, pixel, row_bytes), channels);
                }
            }
        };
        // Without a norm x does not wait in registers: beside dy in the fill it would spill.
        if (kGeluNorm) load_x();
        // Rows of dy above the item's are zero: slots 0 .. 2R − 1.
        if (role.quad > 0) {
            for (int slot = role.row; slot < 2 * R; slot += kStageRows) {
#pragma unroll
                for (int i = 0; i < 8; ++i) store_shared(gradient_cell(slot, i), make_uint2(0, 0));
            }
        }
        int oldest = 0;  // ring slot of dy's row `row − R`
#pragma unroll 1
        for (int row = item.start; row < item.end + R; row += kStageRows) {
            const auto wrap = [](int slot) { return slot < kRows ? slot : slot - kRows; };
            const int slot = wrap(oldest + wrap(2 * R + role.row));
            Octet dy[4];
            if (kGeluNorm) {
                load_dy(dy, row);
                async_copy_wait<0>();
                __syncwarp();
                const QuadNorm norm(shared.statistics, role);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    std::uint32_t g[4];
                    gelu_norm_pair<Element>(x, k, norm, shared.affine, present, role, shared.z, g);
                }
            } else {
                load_x();
                store_quad(x, present, role, shared.z);
                keep_order();
                load_dy(dy, row);
            }
            if (role.quad > 0) {
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    uint2 low, high;
                    split_pair(dy, k, low, high);
                    store_shared(gradient_cell(slot, 2 * k), low);
                    store_shared(gradient_cell(slot, 2 * k + 1), high);
                }
            }
            __syncthreads();
            walk.advance(canvas, kStageRows);
            if (kGeluNorm && row + kStageRows < item.end + R) load_x();
#pragma unroll
            for (int c = 0; c < kWarpChannels; ++c) {
                correlate_stage<Element, K>(sums[c], shared.bias, shared.z.bytes, shared.dy, oldest,
                                            warp * kWarpChannels + c, lane);
            }
            oldest = wrap(oldest + kStageRows);
            __syncthreads();
        }
    }

    // The diagonals: all Q to shared memory, a thread sums the 8 elements of a tap.
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int c = 0; c < kWarpChannels; ++c) {
        const int channel = warp * kWarpChannels + c;
#pragma unroll
        for (int ky = 0; ky < K; ++ky) {
            float (*q)[8] = shared.sums[channel * K + ky];
            store_shared(&q[g][2 * t], make_float2(sums[c][ky][0], sums[c][ky][1]));
            store_shared(&q[g + 8][2 * t], make_float2(sums[c][ky][2], sums[c][ky][3]));
        }
    }
    __syncthreads();
    const std::size_t first = static_cast<std::size_t>(group) * args.C + channel0;
    for (int i = thread; i < kBlockChannels * K * K; i += kThreads) {
        const int row = i / K, kx = i - row * K;
        if (channel0 + i / (K * K) >= args.C) break;
        const int j = kx + kLeadPixels - R;
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < 8; ++n) sum += load_shared<float>(&shared.sums[row][j + n][n]);
        store_global(args.dweight + first * K * K + i, sum);
    }
    if (args.dbias != nullptr && thread < kBlockChannels && channel0 + thread < args.C) {
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const auto pair = load_shared<float2>(&shared.bias.pairs[thread][n]);
            sum += pair.x + pair.y;
        }
        store_global(args.dbias + first + thread, sum);
    }
}

template <class Element, int K, bool kGeluNorm, bool kVector>
void launch_depthwise_wgrad(const char* name, const DepthwiseWgradArgs& args, void* stream) {
    run({.kernel = name,
         .grid = dim3(static_cast<unsigned>(args.groups) * args.channel_blocks),
         .block = dim3(kThreads),
         .shared_bytes = sizeof(DepthwiseWgradShared<K>),
         .stream = stream},
        depthwise_wgrad_kernel<Element, K, kGeluNorm, kVector>, args);
}

}  // namespace convnest::cuda
