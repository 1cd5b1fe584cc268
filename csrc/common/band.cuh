// The depthwise convolution of a row as a banded matrix product on the tensor cores.
//
//     out[8m + n] = Σ_j In[8m − 4 + j] · T_ky[j, n],    T_ky[j, n] = w[ky, j − n − (4 − R)]
//
// M: 16 tiles m of 8 pixels, K: a window of 16 pixels j, N: the tile's 8 outputs n; the band has
// K taps and fits for K <= 9 (R = K/2). The window of an input row is loaded once and meets all K
// kernel rows, in a ring of K accumulators: accumulator k belongs to the output row that is k rows
// from finished, so `acc[k] = A · T[K−1−k] + acc[k+1]`; acc[0] is then a finished row.
#pragma once

#include "common/mma.cuh"
#include "common/planes.cuh"

namespace convnest::cuda {

// Banded weights: row (channel, ky) holds w[ky, e] at element e + shift, zeros around, so that a
// fragment register, the pair (w[e], w[e + 1]), is one 4-byte load at any lane's e. Two copies,
// the second shifted by one more element, keep that load aligned for odd e. The zeros right of a
// row are those left of the next.
template <int K>
struct BandLayout {
    static constexpr int kOffset = kLeadPixels - K / 2;          // e = j − n − kOffset
    static constexpr int kShift = (7 + kOffset + 1) / 2 * 2;     // even; least e is −7 − kOffset
    static constexpr int kGreatest = 15 - kOffset + kShift + 1;  // of e + shift, either copy
    static constexpr int kRowWords = kGreatest / 2 + 1;
    static constexpr int kRows = kBlockChannels * K;
    // No row's zeros meet the taps of the next one, nor its taps the next one's zeros.
    static constexpr int kPastTaps = (K + kShift) / 2 + 1, kZeros = kRowWords - kShift / 2;
    static constexpr int kRowStride = kPastTaps > kZeros ? kPastTaps : kZeros;
    static constexpr int kWords = kRows * kRowStride + kRowWords - kRowStride;
    // The copies' words lie 16 banks apart: one load touches at most 13 words of each.
    static constexpr int kCopyWords = (kWords + 15) / 32 * 32 + 16;
};

template <int K>
struct Bands {
    std::uint32_t words[2 * BandLayout<K>::kCopyWords];
};

// weight: [C, K·K] of this block's first channel; `channels` of them exist. `flipped`: of the
// transposed convolution, which gives the gradient of the input.
template <class Element, int K>
__device__ __forceinline__ void fill_bands(Bands<K>& bands, const float* weight, int channels,
                                           bool flipped, int thread) {
    using Layout = BandLayout<K>;
    for (int row = thread; row < Layout::kRows; row += kThreads) {
        const int channel = row / K, ky = row - channel * K;
        float w[K];
#pragma unroll
        for (int kx = 0; kx < K; ++kx) {
            const int tap = flipped ? (K - 1 - ky) * K + (K - 1 - kx) : ky * K + kx;
            w[kx] = channel < channels ? load_global(weight + channel * K * K + tap) : 0.f;
        }
        const auto tap = [&](int e) { return e >= 0 && e < K ? w[e] : 0.f; };
        std::uint32_t* even = bands.words + row * Layout::kRowStride;
#pragma unroll
        for (int i = 0; i < Layout::kRowWords; ++i) {
            if (i >= Layout::kRowStride && row + 1 < Layout::kRows) break;
            const int e = 2 * i - Layout::kShift;
            store_shared(even + i, Element::pack(tap(e), tap(e + 1)));
            store_shared(even + Layout::kCopyWords + i, Element::pack(tap(e - 1), tap(e)));
        }
    }
}

// This lane's first fragment word of `channel`'s band; see load_band.
template <int K>
__device__ __forceinline__ const std::uint32_t* band_address(const Bands<K>& bands, int channel,
                                                             int lane) {
    using Layout = BandLayout<K>;
    const int g = lane >> 2, t = lane & 3;
    const int e = 2 * t - g - Layout::kOffset;
    const int copy = e & 1;
    return bands.words + copy * Layout::kCopyWords + channel * K * Layout::kRowStride +
           (e + Layout::kShift + copy) / 2;
}

template <int K>
__device__ __forceinline__ void load_band(FragmentB (&band)[K], const std::uint32_t* address) {
#pragma unroll
    for (int ky = 0; ky < K; ++ky) {
        band[ky][0] = load_shared<std::uint32_t>(address + ky * BandLayout<K>::kRowStride);
        band[ky][1] = load_shared<std::uint32_t>(address + ky * BandLayout<K>::kRowStride + 4);
    }
}

template <int K>
using Ring = FragmentC[K];

// What the accumulators of a channel start from: its bias, four times (one fragment).
struct Starts {
    float4 channels[kBlockChannels];
};

__device__ __forceinline__ void fill_starts(Starts& starts, const float* bias, int channel0, int C,
                                            int thread) {
    if (thread >= kBlockChannels) return;
    const int channel = channel0 + thread;
    const float b = bias != nullptr && channel < C ? load_global(bias + channel) : 0.f;
    store_shared(&starts.channels[thread], make_float4(b, b, b, b));
}

__device__ __forceinline__ void load_start(FragmentC& start, const Starts& starts, int channel) {
    const auto b = load_shared<float4>(&starts.channels[channel]);
    start[0] = b.x, start[1] = b.y, start[2] = b.z, start[3] = b.w;
}

// Every sum starts from `start`, also those of the rows whose first input rows are a gap's zeros
// that the march left out.
template <int K>
__device__ __forceinline__ void begin(Ring<K>& ring, const FragmentC& start) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) ring[k][i] = start[i];
    }
}

// Takes in one input row; ring[0] is then a finished output row. `start`: what a sum starts from.
template <class Element, int K>
__device__ __forceinline__ void push_row(Ring<K>& ring, const FragmentA& window,
                                         const FragmentB (&band)[K], const FragmentC& start) {
#pragma unroll
    for (int k = 0; k < K - 1; ++k) mma<Element>(ring[k], window, band[K - 1 - k], ring[k + 1]);
    mma<Element>(ring[K - 1], window, band[0], start);
}

// Convolves a stage of one channel in place: reads its 4 input rows, and leaves the 4 output rows
// that they finish (rows −R .. 3 − R of the stage) in the same planes, output row y in plane row
// y mod 4. A thread thus finds, in the cells it filled, the output of the row that it filled in
// this stage (rows r < 4 − R) or in the one before. `plane`: the channel's.
template <class Element, int K>
__device__ __forceinline__ void convolve_stage(Ring<K>& ring, const FragmentB (&band)[K],
                                               unsigned char* planes, int plane, int lane,
                                               const FragmentC& start) {
    constexpr int R = K / 2;
    const int g = lane >> 2, t = lane & 3;
    const unsigned char* windows = planes + window_address(plane, lane);
    unsigned char* outputs = planes + plane * kPlaneBytes + kLeadPixels * 2 + lane * 4;
    const auto push = [&](int row, const FragmentA& window) {
        push_row<Element, K>(ring, window, band, start);
        __syncwarp();  // all lanes have read the plane that is written now
        unsigned char* output = outputs + ((row - R) & 3) * kPlaneRowBytes;
        store_shared(output, Element::pack(ring[0][0], ring[0][1]));
        // The last tile's outputs from 4 on lie beyond the canvas, in the block of zeros.
        if (!(g == 7 && t >= 2)) {
            store_shared(output + 128, Element::pack(ring[0][2], ring[0][3]));
        }
    };
    if constexpr (K == 7) {
        // Output row y takes the place of input row y + 1: read that one ahead.
        FragmentA window, next;
        load_matrices<false>(next, windows);
#pragma unroll
        for (int row = 0; row < kStageRows; ++row) {
#pragma unroll
            for (int i = 0; i < 4; ++i) window[i] = next[i];
            if (row + 1 < kStageRows) {
                load_matrices<false>(next, windows + (row + 1) * kPlaneRowBytes);
            }
            push(row, window);
        }
    } else {
        FragmentA window[kStageRows];
#pragma unroll
        for (int row = 0; row < kStageRows; ++row) {
            load_matrices<false>(window[row], windows + row * kPlaneRowBytes);
        }
#pragma unroll
        for (int row = 0; row < kStageRows; ++row) push(row, window[row]);
    }
}

// Stages between the one in which a thread fills its row and the one that finishes that row.
template <int K>
__device__ __forceinline__ int stages_late(int row) {
    return row + K / 2 >= kStageRows ? 1 : 0;
}

}  // namespace convnest::cuda
