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
    int channel_blocks;
    int groups;
    // The launch fills in what follows from these.
    BottomImages bottom = {};
    std::uint32_t row_bytes = 0;  // of a pixel's C channels
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

// The next stage's rows on their way, where shared memory has room for them (kAhead).
template <bool kAhead>
struct NextRows {
    Staging x, dy;
};
template <>
struct NextRows<false> {};

template <int K, bool kAhead>
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
    NextRows<kAhead> next;
};
// Two blocks, and 1 KB of the system's for each, share the 164 KB of sm_80 and the 228 KB of sm_90.
static_assert(sizeof(DepthwiseWgradShared<7, false>) <= 81 * 1024);
static_assert(sizeof(DepthwiseWgradShared<7, true>) <= 113 * 1024);

// A lane's ldmatrix row addresses, transposed: of z's window, matrices in the order of fragment A
// (columns 0–7, 8–15 of tiles 0–7, then of tiles 8–15) ...
__device__ __forceinline__ int window_address_transposed(int plane, int lane) {
    const int tile = (lane & 7) + (lane >> 4) * 8;
    return plane * kPlaneBytes + (tile + (lane >> 3 & 1)) * 16;
}

// ... and of dy, two rows at once, each in the order of fragment B (tiles 0–7, 8–15).
__device__ __forceinline__ int gradient_address(int plane, int lane) {
    const int tile = (lane & 7) + (lane >> 3 & 1) * 8;
    return (lane >> 4) * kPlaneRowBytes + plane * kPlaneBytes + tile * 16;
}

// A channel's share of a stage, in its `plane`: rows z[0..3], meeting dy rows −R .. 3 + R.
// `oldest`: where row −R lies in dy's ring, a multiple of two rows' bytes.
template <class Element, int K>
__device__ __forceinline__ void correlate_stage(Ring<K>& sums, BiasSums& bias_sums,
                                                const unsigned char* z, const unsigned char* dy,
                                                int oldest, int channel, int plane, int lane) {
    constexpr int kRows = kGradientRows<K>;
    const unsigned char* windows = z + window_address_transposed(plane, lane);
    const unsigned char* gradients = dy + gradient_address(plane, lane) + oldest;
    const FragmentA ones = {Element::kOnes, Element::kOnes, Element::kOnes, Element::kOnes};
    FragmentC bias_sum = {0.f, 0.f, 0.f, 0.f};
    FragmentB gradient[kRows];
    const auto load = [&](int row) {  // and row + 1; row is even
        const bool wraps = oldest >= (kRows - row) * kPlaneRowBytes;
        std::uint32_t r[4];
        load_matrices<true>(
            r, (wraps ? gradients - kRows * kPlaneRowBytes : gradients) + row * kPlaneRowBytes);
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

// kVector: 16-byte accesses; C % 8 == 0, x and dy are 16-byte aligned. With the norm, which runs
// where nested_conv_bwd_kernel does not, two blocks to an SM leave too few registers. kAhead: with
// vectors and without the norm, the next stage's rows come while this one's are multiplied.
template <class Element, int K, bool kGeluNorm, bool kAhead, bool kVector>
__global__ void __launch_bounds__(kThreads, kMinBlocks<K, kVector && !kGeluNorm>)
    depthwise_wgrad_kernel(DepthwiseWgradArgs args) {
    static_assert(!kAhead || (kVector && !kGeluNorm));
    using Shared = DepthwiseWgradShared<K, kAhead>;
    CONVNEST_SHARED_MEMORY(Shared, shared);
    constexpr int R = K / 2, kRows = kGradientRows<K>;
    const Canvas& canvas = args.canvas;
    const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
    const int channel0 = blockIdx.x % args.channel_blocks * kBlockChannels;
    const Role role(thread);
    const int octet0 = channel0 + role.half * 8, channels = args.C - octet0;

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
    const auto gradient_cell = [&](int place, int i) {
        return shared.dy + place + (2 * i + role.half) * kPlaneBytes + role.quad * 8 -
               kLeadPixels * 2;
    };

#pragma unroll 1
    for (int index = blockIdx.x / args.channel_blocks; index < canvas.items; index += args.groups) {
        Item item = item_of(canvas, index);
        // The first rows of z lie above the outputs, in a gap if the image starts here: dy's ring
        // is then filled from the item's first row on.
        item.top_y -= R - (item.first - item.start);
        item.start = item.first - R;
        const PixelQuad quad(canvas, item, role.quad * 4 - kLeadPixels);
        const QuadBits pixels(quad, args.bottom, recompute_from(octet0) < args.C);
        shared.offsets.store(quad, role);
        __syncthreads();

        RowWalk<R> walk(canvas, item, role.row);  // of z; that of dy is R rows ahead
        Octet x[4] = {};                          // with the norm: the next stage's, on its way
        const auto present = [&] {                // bits of z's row, see QuadBits
            const bool reads = walk.inside(canvas, args.bottom);
            return reads ? pixels.at(walk.pixel, args.bottom) : 0;
        };
        const auto load_x = [&] {
            const unsigned bits = present();
            const std::uint16_t* tensor = args.x + octet0;
            std::uint32_t offset[4];
            shared.offsets.load(offset, role);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const std::uint32_t pixel = walk.pixel + offset[i];
                if (!kGeluNorm) x[i] = Octet{};
                if (bits >> (8 + i) & 1) {
                    x[i] = load_octet<kVector>(at_pixel(tensor, pixel, args.row_bytes), channels);
                }
                if (kGeluNorm) {
                    shared.statistics.fetch(role, i, args.mean, args.rstd, pixel, bits >> i & 1);
                }
            }
            if (kGeluNorm) async_copy_commit();
        };
        // dy has no registers to wait in: it is read and used in a fill, with the norm in between.
        const auto load_dy = [&](Octet(&dy)[4], int left) {
            RowWalk<R> ahead = walk;
            ahead.advance(canvas, R);
            const bool reads = ahead.inside(canvas) && R + role.row < left;
            const unsigned bits = reads ? pixels.at(ahead.pixel, args.bottom) : 0;
            const std::uint16_t* tensor = args.dy + octet0;
            std::uint32_t offset[4];
            shared.offsets.load(offset, role);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                dy[i] = Octet{};
                if (bits >> (12 + i) & 1) {
                    dy[i] = load_octet<kVector>(
                        at_pixel(tensor, ahead.pixel + offset[i], args.row_bytes), channels);
                }
            }
        };
        // Without a norm x does not wait in registers: beside dy in the fill it would spill. It
        // comes to L2 meanwhile, as dy does: of a pixel's two threads one asks for x, one for dy.
        const auto prefetch = [&] {
            RowWalk<R> row = walk;
            if (role.half != 0) row.advance(canvas, R);
            const bool reads = row.inside(canvas, args.bottom);
            const unsigned bits = reads ? pixels.at(row.pixel, args.bottom) : 0;
            const std::uint16_t* tensor = (role.half != 0 ? args.dy : args.x) + octet0;
            std::uint32_t offset[4];
            shared.offsets.load(offset, role);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                prefetch_global(at_pixel(tensor, row.pixel + offset[i], args.row_bytes),
                                bits >> (8 + i) & 1);
            }
        };
        // Both stages' rows, of x and R rows ahead of dy, to this thread's own places.
        const auto fetch = [&](int left) {
            if constexpr (kAhead) {
                RowWalk<R> ahead = walk;
                ahead.advance(canvas, R);
                const bool reads = ahead.inside(canvas) && R + role.row < left;
                const unsigned of_x = present();
                const unsigned of_dy = reads ? pixels.at(ahead.pixel, args.bottom) : 0;
                const int octet = recompute_from(octet0);
                std::uint32_t offset[4];
                shared.offsets.load(offset, role);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    shared.next.x.template fetch<true>(
                        thread, i, at_pixel(args.x + octet, walk.pixel + offset[i], args.row_bytes),
                        channels, of_x >> (8 + i) & 1);
                    shared.next.dy.template fetch<true>(
                        thread, i,
                        at_pixel(args.dy + octet, ahead.pixel + offset[i], args.row_bytes),
                        channels, of_dy >> (12 + i) & 1);
                }
                async_copy_commit();
            }
        };
        if (kGeluNorm) load_x();
        fetch(item.end - item.start);
        // Rows of dy above the item's are zero: slots 0 .. 2R − 1.
        if (role.quad > 0) {
            for (int slot = role.row; slot < 2 * R; slot += kStageRows) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    store_shared(gradient_cell(slot * kPlaneRowBytes, i), make_uint2(0, 0));
                }
            }
        }
        constexpr int kRingBytes = kRows * kPlaneRowBytes;
        const auto wrap = [](int place) { return place < kRingBytes ? place : place - kRingBytes; };
        int oldest = 0;  // where dy's row `row − R` lies in the ring
#pragma unroll 1
        for (int left = item.end - item.start; left > -R; left -= kStageRows) {
            const int place = wrap(oldest + (2 * R + role.row) * kPlaneRowBytes);
            Octet dy[4];
            if (kGeluNorm) {
                load_dy(dy, left);
                async_copy_wait<0>();
                __syncwarp();
                const unsigned bits = present();
                const QuadNorm norm(shared.statistics, role);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    std::uint32_t g[4];
                    gelu_norm_pair<Element>(x, k, norm, shared.affine, bits, role, shared.z, g);
                }
            } else if constexpr (kAhead) {
                async_copy_wait<0>();
                shared.next.x.take(x, thread);
                store_quad(x, role, shared.z);
                keep_order();
                shared.next.dy.take(dy, thread);
            } else {
                load_x();
                store_quad(x, role, shared.z);
                keep_order();
                load_dy(dy, left);
            }
            if (role.quad > 0) {
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    uint2 low, high;
                    split_pair(dy, k, low, high);
                    store_shared(gradient_cell(place, 2 * k), low);
                    store_shared(gradient_cell(place, 2 * k + 1), high);
                }
            }
            __syncthreads();
            walk.advance(canvas, kStageRows);
            if (kGeluNorm && left > kStageRows - R) load_x();
            if (kAhead && left > kStageRows - R) fetch(left - kStageRows);
            if (kVector && !kAhead && (!kGeluNorm || role.half != 0)) prefetch();
#pragma unroll
            for (int c = 0; c < kWarpChannels; ++c) {
                correlate_stage<Element, K>(sums[c], shared.bias, shared.z.bytes, shared.dy, oldest,
                                            warp * kWarpChannels + c, warp_plane(warp, c), lane);
            }
            oldest = wrap(oldest + kStageRows * kPlaneRowBytes);
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
    const unsigned block = blockIdx.x;
    const int group = block / args.channel_blocks;
    const int start = block % args.channel_blocks * kBlockChannels;
    const std::size_t first = static_cast<std::size_t>(group) * args.C + start;
    for (int i = thread; i < kBlockChannels * K * K; i += kThreads) {
        const int row = i / K, kx = i - row * K;
        if (start + i / (K * K) >= args.C) break;
        const int j = kx + kLeadPixels - R;
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < 8; ++n) sum += load_shared<float>(&shared.sums[row][j + n][n]);
        store_global(args.dweight + first * K * K + i, sum);
    }
    if (args.dbias != nullptr && thread < kBlockChannels && start + thread < args.C) {
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
void launch_depthwise_wgrad(const char* name, DepthwiseWgradArgs args, void* stream) {
    args.bottom = bottom_images(args.canvas);
    args.row_bytes = 2 * static_cast<std::uint32_t>(args.C);
    const auto launch = [&](auto ahead) {
        constexpr bool kAhead = decltype(ahead)::value;
        run({.kernel = name,
             .grid = dim3(static_cast<unsigned>(args.groups) * args.channel_blocks),
             .block = dim3(kThreads),
             .shared_bytes = sizeof(DepthwiseWgradShared<K, kAhead>),
             .stream = stream},
            depthwise_wgrad_kernel<Element, K, kGeluNorm, kAhead, kVector>, args);
    };
    if constexpr (kVector && !kGeluNorm) {
        // Twice, for two blocks share an SM, and 1 KB of the system's for each.
        const std::size_t of_two = 2 * (sizeof(DepthwiseWgradShared<K, true>) + 1024);
        if (of_two <= static_cast<std::size_t>(device_shared_bytes()) + 1024) {
            return launch(std::true_type{});
        }
    }
    launch(std::false_type{});
}

}  // namespace convnest::cuda
