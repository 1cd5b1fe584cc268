// nested_conv, backward, the wide kernel, bf16 and fp16 on the tensor cores:
//
//     du = dv ⊙ GELU'(u);   dz = DWᵀ(du);   x̂ = (GELU(h) − mean)·rstd;   z = γx̂ + β
//     p  = rstd·γ·dz [+ du]                     what the norm's gradient is made of, in one tensor:
//     dh = GELU'(h) ⊙ (p − rstd·(m1 + x̂·m2)),  m1 = mean_c(γ·dz), m2 = mean_c(γ·dz·x̂)
//
// Reads dv, u (halo of R), h, mean, rstd; writes p, each pixel's sums of γ·dz and γ·dz·x̂ over the
// block's 16 channels, and an item's sums of dw, db, dγ, dβ. nested_conv_finish.cuh makes dh.
//
// 512 threads, one block to an SM; a block takes 16 channels of an item of the canvas, a warp one
// of them, with both rings of K accumulators: dz's (band.cuh) and the weight gradient's
// (depthwise_wgrad.cuh). It marches down the rows, 4 rows of z to a stage, du R rows ahead:
//     fetch   the stage's rows, asynchronously where shared memory has room for them
//     fill    z and x̂ of rows y .. y + 3; du of rows y + R .. y + R + 3, into its ring
//     product weight gradient: z against du of rows y − R .. y + 3 + R; then dz of rows y .. y + 3,
//             written over z; then dγ and dβ: dz against x̂ and against the mask of what counts
//     drain   dz, x̂ and du to p and the row sums
// So every element of h is read and normed once, for the pixels that the item owns; du alone has a
// halo, and the first one or two stages fill its ring and dz's accumulators alone.
//
// How the parts follow each other is a matter of shared memory, the bits are the same:
//     direct      fetch and fill, barrier, product, barrier, drain
//     ahead       fill, barrier, fetch of the next stage, product, barrier, drain
//     overlapped  barrier, product of stage s; drain of s − 1, fill of s + 1, fetch of s + 2
// A thread drains the cells that it fills next, and the ring is so long that the drain reads its
// rows of du while a fill writes: no barrier stands between the two. Overlapped, half of the warps
// multiply first and half last, so that the tensor cores, the arithmetic and the memory of these
// parts have work at the same time.
#pragma once

#include "common/row_statistics.cuh"
#include "nested_conv_bwd_shared.cuh"

namespace convnest::cuda {

// C % 8 == 0, and all tensors are 16-byte aligned.
struct NestedConvBwdArgs {
    const std::uint16_t* dv;  // [N, H, W, C]
    const std::uint16_t* u;   // [N, H, W, C]
    const std::uint16_t* h;   // [N, H, W, C]
    const float* mean;        // [N, H, W]
    const float* rstd;        // [N, H, W]
    const float* weight;      // [C, K·K]
    const float* ln_weight;   // [C] or null
    const float* ln_bias;     // [C] or null
    std::uint16_t* p;         // [N, H, W, C] or null, with row_sums
    float2* row_sums;         // [channel_blocks, N·H·W]
    float* dweight;           // [items, C, K·K] or null, with dbias
    float* dbias;             // [items, C]
    float* dnorm;             // [items, 2, C]: of dγ and dβ
    bool shortcut;
    int C;
    Canvas canvas;
    BottomImages bottom;
    std::uint32_t row_bytes;    // of a pixel's C channels
    std::uint32_t pixel_count;  // N·H·W
    int channel_blocks;
};

// Stages before an item's first one: du's ring and dz's accumulators want the rows from R above the
// first on (in a gap they are zeros already).
template <int K>
__host__ __device__ __forceinline__ int warm_up_stages(const Item& item) {
    return (K / 2 + item.first - item.start + kStageRows - 1) / kStageRows;
}

template <class Element, int K, Schedule kSchedule>
__global__ void __launch_bounds__(kPairThreads, 1) nested_conv_bwd_kernel(NestedConvBwdArgs args) {
    using Shared = NestedConvBwdShared<K, kSchedule>;
    CONVNEST_SHARED_MEMORY(Shared, shared);
    constexpr int R = K / 2;
    constexpr bool kAhead = kSchedule != Schedule::direct;
    constexpr bool kOverlapped = kSchedule == Schedule::overlapped;
    auto& du_ring = shared.planes.du;
    const Canvas& canvas = args.canvas;
    const int thread = threadIdx.x, lane = thread % kWarpSize;
    // The compiler is to know that it is the same in a warp.
    const int channel = __shfl_sync(kFullWarp, thread / kWarpSize, 0);
    const int channel_block = blockIdx.x % args.channel_blocks;
    const int index = blockIdx.x / args.channel_blocks;
    const int channel0 = channel_block * kBlockChannels;
    Item item = item_of(canvas, index);
    const PairRole role(thread, channel / 4);

    // Parameters, and zeros where planes have no pixel and above the item's first rows of du
    fill_bands<Element, K>(shared.bands, args.weight + channel0 * K * K, args.C - channel0, true,
                           thread);
    shared.affine.fill(args.ln_weight, args.ln_bias, channel0, args.C, thread);
    auto* planes = reinterpret_cast<unsigned char*>(&shared.planes);
    for (int i = thread * 16; i < static_cast<int>(sizeof(shared.planes)); i += kPairThreads * 16) {
        store_shared(planes + i, make_uint4(0, 0, 0, 0));
    }

    // Where this thread reads and writes
    const int octet0 = channel0 + role.half * 8;
    const PixelQuad quad(canvas, item, role.pair / 2 * 4 - kLeadPixels);
    QuadBits pixels(quad, args.bottom, octet0 < args.C);
    pixels.bits >>= role.pair % 2 * 2;  // of the quad's pixels these two
    shared.offsets.store(quad, role);

    const int start = item.first - warm_up_stages<K>(item) * kStageRows;
    item.top_y -= item.start - start;
    RowWalk<R> walk(canvas, item, role.row);    // of z
    const int outputs = item.end - item.first;  // rows
    const int all_rows = item.end - start;      // of z; the first of them warm up

    // A stage's rows: on their way in shared memory, or just read
    Octet dv[2], u[2], h[2];
    float2 mean, rstd;
    unsigned present;  // bits of z's pixels, and from bit 8 on of those whose channels exist
    // `rows`: of z to come.
    const auto fetch = [&](int rows) {
        RowWalk<R> ahead = walk;
        ahead.advance(canvas, R);
        const int left = rows - role.row;
        unsigned present_du = 0;
        if (ahead.inside(canvas) && left > 0 && left <= outputs + 2 * R) {
            present_du = pixels.at(ahead.pixel, args.bottom);
        }
        present = 0;
        if (walk.inside(canvas) && left > 0 && left <= outputs) {
            present = pixels.at(walk.pixel, args.bottom) >> 4;
        }
        const int octet = recompute_from(octet0);  // pointers kept would take two registers each
        std::uint32_t offset[2];
        shared.offsets.load(offset, role);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const std::uint32_t du = ahead.pixel + offset[i], z = walk.pixel + offset[i];
            const bool has_du = present_du >> (8 + i) & 1;
            const bool has_z = present >> i & 1, has_h = present >> (8 + i) & 1;
            const auto* dv_at = at_pixel(args.dv + octet, du, args.row_bytes);
            const auto* u_at = at_pixel(args.u + octet, du, args.row_bytes);
            const auto* h_at = at_pixel(args.h + octet, z, args.row_bytes);
            if constexpr (kAhead) {
                shared.next.dv.fetch(thread, i, dv_at, has_du);
                shared.next.u.fetch(thread, i, u_at, has_du);
                shared.next.h.fetch(thread, i, h_at, has_h);
                shared.next.statistics.fetch(role, i, args.mean, args.rstd, z, has_z);
            } else {
                dv[i] = has_du ? load_octet<true>(dv_at, 8) : Octet{};
                u[i] = has_du ? load_octet<true>(u_at, 8) : Octet{};
                h[i] = has_h ? load_octet<true>(h_at, 8) : Octet{};
                (i == 0 ? mean.x : mean.y) = has_z ? load_global(args.mean + z) : 0.f;
                (i == 0 ? rstd.x : rstd.y) = has_z ? load_global(args.rstd + z) : 0.f;
            }
        }
        if constexpr (kAhead) async_copy_commit();
    };
    const auto fill_du = [&](int entering) {
        unsigned char* cells = du_ring.row(entering + role.row) + role.template cell<4>(0);
        if constexpr (kAhead) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                dv[i] = shared.next.dv.take(thread, i), u[i] = shared.next.u.take(thread, i);
            }
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            float low[2], high[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                low[i] = Element::low(dv[i].pair[k]) *
                         gelu_slope_of<Element>(Element::low(u[i].pair[k]));
                high[i] = Element::high(dv[i].pair[k]) *
                          gelu_slope_of<Element>(Element::high(u[i].pair[k]));
            }
            store_shared(cells + 2 * k * kPairPlaneBytes, Element::pack(low[0], low[1]));
            store_shared(cells + (2 * k + 1) * kPairPlaneBytes, Element::pack(high[0], high[1]));
        }
    };
    const auto fill_z = [&](StagePlanes& stage, unsigned present) {
        const int cells = role.row * kPairRowBytes + role.cell<8>(0);
        const std::uint32_t mask = pixel_mask(present, 0);
        if constexpr (kAhead) {
            mean = shared.next.statistics.load(0, role);
            rstd = shared.next.statistics.load(1, role);
#pragma unroll
            for (int i = 0; i < 2; ++i) h[i] = shared.next.h.take(thread, i);
        }
        stage.rstd.store(role, rstd);
        const float scale[2] = {rstd.x, rstd.y};
        const float shift[2] = {-mean.x * rstd.x, -mean.y * rstd.y};
        stage.masks.template store<Element>(role, mask);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const auto gamma = load_shared<float2>(&shared.affine.gamma[role.half * 8 + 2 * k]);
            const auto beta = load_shared<float2>(&shared.affine.beta[role.half * 8 + 2 * k]);
            float low[2], high[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                low[i] = fmaf(gelu_of<Element>(Element::low(h[i].pair[k])), scale[i], shift[i]);
                high[i] = fmaf(gelu_of<Element>(Element::high(h[i].pair[k])), scale[i], shift[i]);
            }
            const int cell = cells + 2 * k * kPairPlaneBytes;
            // Of a pixel that does not exist h, mean and rstd are zero, and so is x̂.
            store_shared(stage.normal.bytes + cell, Element::pack(low[0], low[1]));
            store_shared(stage.normal.bytes + cell + kPairPlaneBytes,
                         Element::pack(high[0], high[1]));
            store_shared(
                stage.z.bytes + cell,
                Element::pack(fmaf(low[0], gamma.x, beta.x), fmaf(low[1], gamma.x, beta.x)) & mask);
            store_shared(
                stage.z.bytes + cell + kPairPlaneBytes,
                Element::pack(fmaf(high[0], gamma.y, beta.y), fmaf(high[1], gamma.y, beta.y)) &
                    mask);
        }
    };
    // `row`: the row's first pixel; `owned`: bits of the pixels to write; `finished`: the ring slot
    // of du's row y.
    const auto drain = [&](const StagePlanes& stage, std::uint32_t row, unsigned owned,
                           int finished) {
        const int cells = role.row * kPairRowBytes + role.cell<8>(0);
        const unsigned char* du_cells =
            du_ring.row(du_ring.wrap(finished + role.row)) + role.template cell<4>(0);
        const bool shortcut = recompute_from(args.shortcut);  // or all of this is there twice
        const float2 scales = stage.rstd.load(role);
        const float scale[2] = {scales.x, scales.y};
        float sum[2] = {0.f, 0.f}, sum_normal[2] = {0.f, 0.f};
        Octet out[2];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const auto gamma = load_shared<float2>(&shared.affine.gamma[role.half * 8 + 2 * k]);
            float value[2][2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int plane = (2 * k + c) * kPairPlaneBytes;
                const auto dz = load_shared<std::uint32_t>(stage.z.bytes + cells + plane);
                const auto normal = load_shared<std::uint32_t>(stage.normal.bytes + cells + plane);
                std::uint32_t du = 0;
                if (shortcut) du = load_shared<std::uint32_t>(du_cells + plane);
                const float factor = c == 0 ? gamma.x : gamma.y;
                const float a[2] = {Element::low(dz) * factor, Element::high(dz) * factor};
                sum[0] += a[0], sum[1] += a[1];
                sum_normal[0] = fmaf(a[0], Element::low(normal), sum_normal[0]);
                sum_normal[1] = fmaf(a[1], Element::high(normal), sum_normal[1]);
                value[0][c] = fmaf(a[0], scale[0], Element::low(du));
                value[1][c] = fmaf(a[1], scale[1], Element::high(du));
            }
            out[0].pair[k] = Element::pack(value[0][0], value[0][1]);
            out[1].pair[k] = Element::pack(value[1][0], value[1][1]);
        }
        // The two threads of a pair have 8 channels each; each gets the sums of one pixel.
        const auto both = [&](const float (&part)[2]) {
            const float own = role.half ? part[1] : part[0];
            return own + __shfl_xor_sync(kFullWarp, role.half ? part[0] : part[1], 1);
        };
        const float2 sums = make_float2(both(sum), both(sum_normal));
        const int octet = recompute_from(octet0);
        std::uint32_t offset[2];
        shared.offsets.load(offset, role);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const std::uint32_t pixel = row + offset[i];
            if (!(owned >> i & 1)) continue;
            if (octet < args.C) {
                store_octet<true>(at_pixel(args.p + octet, pixel, args.row_bytes), out[i], 8);
            }
            if (role.half == i) {
                store_global(args.row_sums +
                                 static_cast<std::size_t>(channel_block) * args.pixel_count + pixel,
                             sums);
            }
        }
    };

    Ring<K> ring, sums;
    FragmentC bias_sum, norm_sums;
    const FragmentC zero = {0.f, 0.f, 0.f, 0.f};
    begin<K>(ring, zero);
    begin<K>(sums, zero);
#pragma unroll
    for (int i = 0; i < 4; ++i) bias_sum[i] = norm_sums[i] = 0.f;
    // `entering`: the ring slot of du's row y + R.
    const auto multiply = [&](StagePlanes& stage, int entering, bool finishes) {
        if (finishes && args.dweight != nullptr) {
            correlate_rows<Element, K>(sums, bias_sum, stage.z.bytes, du_ring, stage.masks,
                                       du_ring.above(entering, 2 * R), channel, lane);
            __syncwarp();  // all lanes have read the planes that dz is written over
        }
        FragmentB band[K];
        load_band<K>(band, band_address<K>(shared.bands, channel, lane));
        convolve_rows<Element, K>(ring, band, du_ring.row(entering), stage.z.bytes, channel, lane);
        if (finishes) {
            __syncwarp();
            correlate_norm<Element>(norm_sums, stage.z.bytes, stage.normal.bytes, stage.masks,
                                    channel, lane);
        }
    };
    if constexpr (kOverlapped) {
        // Warps w, w + 4, w + 8 and w + 12 share a scheduler: two of them multiply first.
        const bool multiplies_first = channel / 4 % 2 == 0;
        std::uint32_t fetched = 0, filled = 0, multiplied = 0;  // their rows' first pixels
        unsigned owned = 0;                    // their pixels' bits, 2 of each, the fetched lowest
        int rows = all_rows + 2 * kStageRows;  // of z from stage s on
#pragma unroll 1
        for (int s = -2; rows > -kStageRows; ++s, rows -= kStageRows) {
            __syncthreads();
            const std::uint32_t drained = multiplied;
            multiplied = filled, filled = fetched, owned <<= 2;
#pragma unroll 1
            for (int turn = 0; turn < 2; ++turn) {
                if ((turn == 0) == multiplies_first) {
                    if (rows > 0 && rows <= all_rows) {
                        multiply(shared.planes.stages[s & 1], (s & 3) * kStageRows,
                                 rows <= outputs);
                    }
                    continue;
                }
                StagePlanes& stage = shared.planes.stages[~s & 1];
                if (rows + kStageRows <= outputs && args.p != nullptr) {
                    drain(stage, drained, owned >> 6, du_ring.above(((s - 1) & 3) * kStageRows, R));
                }
                const int to_fill = rows - kStageRows, to_fetch = to_fill - kStageRows;
                async_copy_wait<0>();
                __syncwarp();  // the statistics that came and the rstd that went are two threads'
                if (to_fill > 0 && to_fill <= all_rows) {
                    fill_du(((s + 1) & 3) * kStageRows);
                    if (to_fill <= outputs) fill_z(stage, owned >> 2);
                }
                __syncwarp();  // both have taken the statistics
                if (to_fetch > 0) {
                    fetched = walk.pixel;
                    fetch(to_fetch);
                    owned |= present & 3;
                    walk.advance(canvas, kStageRows);
                }
            }
        }
    } else {
        StagePlanes& stage = shared.planes.stages[0];
        int rows = all_rows;  // of z to come
        __syncthreads();      // parameters, offsets and zeros are in shared memory
        if constexpr (kAhead) fetch(rows);
        int entering = 0;
#pragma unroll 1
        while (rows > 0) {
            const bool finishes = rows <= outputs;
            if constexpr (kAhead) {
                async_copy_wait<0>();
            } else {
                fetch(rows);
            }
            __syncwarp();  // the statistics, coming and going, are shared by two threads
            fill_du(entering);
            if (finishes) fill_z(stage, present);
            const std::uint32_t row = walk.pixel;
            const unsigned owned = present;
            __syncthreads();
            walk.advance(canvas, kStageRows);
            rows -= kStageRows;
            if (kAhead && rows > 0) fetch(rows);
            multiply(stage, entering, finishes);
            __syncthreads();
            if (finishes && args.p != nullptr) drain(stage, row, owned, du_ring.above(entering, R));
            entering = du_ring.wrap(entering + kStageRows);
        }
    }

    // The diagonals
    const std::size_t first = static_cast<std::size_t>(index) * args.C;
    const bool writes = lane == 0 && channel0 + channel < args.C;
    const float2 norm = diagonal_sums(norm_sums, lane);
    if (writes) {
        store_global(args.dnorm + 2 * first + channel0 + channel, norm.x);
        store_global(args.dnorm + 2 * first + args.C + channel0 + channel, norm.y);
    }
    if (args.dweight == nullptr) return;
    const float bias = diagonal_sums(bias_sum, lane).x;
    if (writes) store_global(args.dbias + first + channel0 + channel, bias);
    __syncthreads();  // the last drain has read the planes
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int ky = 0; ky < K; ++ky) {
        float (*q)[8] = shared.sums[channel * K + ky];
        store_shared(&q[g][2 * t], make_float2(sums[ky][0], sums[ky][1]));
        store_shared(&q[g + 8][2 * t], make_float2(sums[ky][2], sums[ky][3]));
    }
    __syncthreads();
    for (int i = thread; i < kBlockChannels * K * K; i += kPairThreads) {
        const int row = i / K, kx = i - row * K;
        if (channel0 + i / (K * K) >= args.C) break;
        const int j = kx + kLeadPixels - R;
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < 8; ++n) sum += load_shared<float>(&shared.sums[row][j + n][n]);
        store_global(args.dweight + (first + channel0) * K * K + i, sum);
    }
}

}  // namespace convnest::cuda
