// Shared memory of nested_conv's backward kernel (nested_conv_bwd.cuh), and its schedules: how much
// of it they take decides which one a GPU runs.
#pragma once

#include "common/band.cuh"
#include "common/gelu_norm.cuh"
#include "common/pair_planes.cuh"
#include "nested_conv_bwd_products.cuh"

namespace convnest::cuda {

enum class Schedule { direct, ahead, overlapped };
template <Schedule kSchedule>
constexpr int kBuffers = kSchedule == Schedule::overlapped ? 2 : 1;
// Of du, a stage's rows of z meet K + 3, and the drain reads one more (R = 3) while the next fill
// writes. Overlapped, there are 12 + R from the first that the drain reads to the last that the
// fill writes.
template <Schedule kSchedule>
constexpr int kRingRows = kSchedule == Schedule::overlapped ? 16 : 12;

// Of a stage from its fill to its drain.
struct StagePlanes {
    PairPlanes z;       // lead 8; then dz
    PairPlanes normal;  // lead 8: x̂
    PairMasks masks;
    PairScales rstd;
};

// Rows on their way, where shared memory has room for them.
template <bool kAhead>
struct NextStage {
    PairStaging h, dv, u;
    PairStatistics statistics;
};
template <>
struct NextStage<false> {};

template <int K, Schedule kSchedule>
struct NestedConvBwdShared {
    struct Planes {
        StagePlanes stages[kBuffers<kSchedule>];
        DuRing<kRingRows<kSchedule>> du;  // lead 4
    };
    union {
        Planes planes;
        float sums[kBlockChannels * K][16][8];  // at the end: Q
    };
    Bands<K> bands;
    BlockAffine affine;
    PairOffsets offsets;
    NextStage<kSchedule != Schedule::direct> next;
};
// With 1 KB of the system's in the 100 KB of sm_86, sm_89 and sm_120, in the 164 KB of sm_80, and
// in the 228 KB of sm_90 and sm_100.
static_assert(sizeof(NestedConvBwdShared<7, Schedule::direct>) <= 99 * 1024);
static_assert(sizeof(NestedConvBwdShared<7, Schedule::ahead>) <= 163 * 1024);
static_assert(sizeof(NestedConvBwdShared<7, Schedule::overlapped>) <= 227 * 1024);

}  // namespace convnest::cuda
