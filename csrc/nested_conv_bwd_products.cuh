// What a warp of nested_conv_bwd.cuh multiplies for its channel in a stage of 4 rows: the weight
// gradient, the convolution of du, and the gradients of the norm's parameters.
#pragma once

#include "common/band.cuh"
#include "common/pair_planes.cuh"

namespace convnest::cuda {

// Rows of du, the oldest one overwritten by the next; whole stages, so that the rows that enter lie
// side by side.
template <int kRows>
struct DuRing {
    static_assert(kRows % kStageRows == 0);
    unsigned char bytes[kRows * kPairRowBytes];

    // Of a slot that was counted past the last one, by less than a turn.
    static __device__ __forceinline__ int wrap(int slot) {
        if constexpr ((kRows & (kRows - 1)) == 0) return slot & (kRows - 1);
        return slot < kRows ? slot : slot - kRows;
    }
    // The slot `rows` above.
    static __device__ __forceinline__ int above(int slot, int rows) {
        return wrap(slot + kRows - rows);
    }
    __device__ __forceinline__ const unsigned char* row(int slot) const {
        return bytes + slot * kPairRowBytes;
    }
    __device__ __forceinline__ unsigned char* row(int slot) { return bytes + slot * kPairRowBytes; }
};

// One channel's share of a stage of the weight gradient: 4 rows of z against the rows of du around
// them, `oldest` being the ring slot of row −R. bias_sum gathers du of the 4 rows themselves.
template <class Element, int K, int kRingRows>
__device__ __forceinline__ void correlate_rows(Ring<K>& sums, FragmentC& bias_sum,
                                               const unsigned char* z, const DuRing<kRingRows>& du,
                                               const PairMasks& masks, int oldest, int channel,
                                               int lane) {
    constexpr int kRows = kStageRows + K - 1;
    const unsigned char* windows = z + pair_window_transposed(channel, lane);
    const int tiles = pair_tiles(channel, lane, 0);
    FragmentB gradient[kRows];
    const auto load = [&](int row) {  // and row + 1; row is even
        std::uint32_t r[4];
        load_matrices<true>(r, du.row(du.wrap(oldest + row)) + tiles);
        gradient[row][0] = r[0], gradient[row][1] = r[1];
        gradient[row + 1][0] = r[2], gradient[row + 1][1] = r[3];
    };
#pragma unroll
    for (int row = 0; row < K - 1; row += 2) load(row);
#pragma unroll
    for (int row = 0; row < kStageRows; ++row) {
        if (row % 2 == 0) load(row + K - 1);
        FragmentA window;
        load_matrices<true>(window, windows + row * kPairRowBytes);
#pragma unroll
        for (int ky = 0; ky < K; ++ky) {
            mma<Element>(sums[ky], window, gradient[row + K - 1 - ky], sums[ky]);
        }
        FragmentA counted;  // the lower half, with the other lead, is of no use
        load_matrices<true>(counted, masks.tiles(row, lane));
        mma<Element>(bias_sum, counted, gradient[row + K / 2], bias_sum);
    }
}

// dz of a stage's 4 rows, which du's rows R .. R + 3 finish, to planes of lead 8. `entering`: the
// first of them.
template <class Element, int K>
__device__ __forceinline__ void convolve_rows(Ring<K>& ring, const FragmentB (&band)[K],
                                              const unsigned char* entering, unsigned char* dz,
                                              int channel, int lane) {
    const FragmentC zero = {0.f, 0.f, 0.f, 0.f};
    const unsigned char* windows = entering + pair_window(channel, lane);
    unsigned char* outputs = dz + pair_plane(channel) + 16 + lane * 4;
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int row = 0; row < kStageRows; ++row) {
        FragmentA window;
        load_matrices<false>(window, windows + row * kPairRowBytes);
        push_row<Element, K>(ring, window, band, zero);
        unsigned char* output = outputs + row * kPairRowBytes;
        store_shared(output, Element::pack(ring[0][0], ring[0][1]));
        // The last tile's outputs from 4 on lie beyond the canvas, in the zeros right of z.
        if (!(g == 7 && t >= 2)) {
            store_shared(output + 128, Element::pack(ring[0][2], ring[0][3]));
        }
    }
}

// Σ_m x̂[8m + j]·dz[8m + n] in rows j of `sums`, Σ_m mask[8m + j]·dz[8m + n] in rows 8 + j: dγ and
// dβ are the sums of their diagonals.
template <class Element>
__device__ __forceinline__ void correlate_norm(FragmentC& sums, const unsigned char* dz,
                                               const unsigned char* normal, const PairMasks& masks,
                                               int channel, int lane) {
    const int tiles = pair_tiles(channel, lane, 1);
    // A lane gives the address of a row of x̂ or of the mask, in the fragment's order.
    const int tile = ((lane & 7) + (lane >> 4) * 8 + 1) * 16;
    const bool of_mask = lane >> 3 & 1;
    const unsigned char* factors =
        of_mask ? masks.rows[0][1] + tile : normal + pair_plane(channel) + tile;
    const int row_bytes = of_mask ? sizeof(masks.rows[0]) : kPairRowBytes;
#pragma unroll
    for (int row = 0; row < kStageRows; row += 2) {
        std::uint32_t gradient[4];
        load_matrices<true>(gradient, dz + tiles + row * kPairRowBytes);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            FragmentA a;
            load_matrices<true>(a, factors + (row + i) * row_bytes);
            const FragmentB b = {gradient[2 * i], gradient[2 * i + 1]};
            mma<Element>(sums, a, b, sums);
        }
    }
}

// The sums of the diagonals of a fragment's upper and lower half, in all lanes.
__device__ __forceinline__ float2 diagonal_sums(const FragmentC& c, int lane) {
    const int g = lane >> 2, t = lane & 3;
    float upper = g == 2 * t ? c[0] : g == 2 * t + 1 ? c[1] : 0.f;
    float lower = g == 2 * t ? c[2] : g == 2 * t + 1 ? c[3] : 0.f;
    return make_float2(warp_sum(upper), warp_sum(lower));
}

}  // namespace convnest::cuda
