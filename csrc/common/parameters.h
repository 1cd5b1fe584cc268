// Parameters as the CPU kernels read them (padded to whole vectors of channels, nulls filled in)
// and parameter gradients as they sum them: one partial per chunk of work, added up in order.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "simd.h"

namespace convnest::CONVNEST_ISA {
namespace {

template <class A>
CONVNEST_INLINE std::int64_t block_count(std::int64_t C) {
    return (C + kLanes<A> - 1) / kLanes<A>;
}

template <class A>
CONVNEST_INLINE std::int64_t padded_channels(std::int64_t C) {
    return block_count<A>(C) * kLanes<A>;
}

// A [C] parameter; lanes beyond C are 0, so that nothing reaches a sum from there.
template <class A>
void copy_parameter(const void* parameter, A when_null, std::int64_t C, A* padded) {
    const A* values = static_cast<const A*>(parameter);
    for (std::int64_t c = 0; c < C; ++c) padded[c] = values != nullptr ? values[c] : when_null;
    for (std::int64_t c = C; c < padded_channels<A>(C); ++c) padded[c] = 0;
}

// The sums of one kernel call, one partial per chunk: [taps * Cp] in reversed order of taps and
// channel-blocked as weight_rows adds them, then kVectors times [Cp].
template <class A>
struct Partials {
    static constexpr int L = kLanes<A>;
    enum Vector { kBias, kGamma, kBeta, kVectors };

    A* data;
    std::int64_t chunks, C;
    int taps;

    static std::int64_t size(std::int64_t C, int taps) {
        return padded_channels<A>(C) * (taps + kVectors);
    }
    static std::int64_t bytes(std::int64_t C, int taps) { return size(C, taps) * sizeof(A); }
    static Partials take(Carver& carver, std::int64_t chunks, std::int64_t C, int taps) {
        return {carver.take<A>(chunks * size(C, taps)), chunks, C, taps};
    }

    void clear(std::int64_t chunk) const { clear(chunk, 0, block_count<A>(C)); }
    // Of `count` blocks.
    void clear(std::int64_t chunk, std::int64_t block, std::int64_t count) const {
        A* of_taps = weight(chunk, block);
        for (std::int64_t i = 0; i < count * taps * L; ++i) of_taps[i] = 0;
        for (int which = 0; which < kVectors; ++which) {
            A* row = vector(chunk, static_cast<Vector>(which)) + block * L;
            for (std::int64_t i = 0; i < count * L; ++i) row[i] = 0;
        }
    }
    A* weight(std::int64_t chunk, std::int64_t block) const {
        return data + chunk * size(C, taps) + block * taps * L;
    }
    A* vector(std::int64_t chunk, Vector which) const {
        return data + chunk * size(C, taps) + padded_channels<A>(C) * (taps + which);
    }
    void add(std::int64_t chunk, Vector which, std::int64_t c, Vec<A> sum) const {
        A* at = vector(chunk, which) + c;
        store(at, load(at) + sum);
    }
    void add_row(std::int64_t chunk, Vector which, const A* row) const {
        for (std::int64_t c = 0; c < padded_channels<A>(C); c += L)
            add(chunk, which, c, load(row + c));
    }

    // The sums over chunks into the gradients that are wanted (not null).
    struct Sum {
        const Partials* partials;
        A* weight;
        A* vectors[kVectors];
        Units units() { return {block_count<A>(partials->C), 0, nullptr, sum_block, this}; }
    };
    Sum sum_into(void* dweight, void* dbias, void* dgamma, void* dbeta) const {
        return {this,
                static_cast<A*>(dweight),
                {static_cast<A*>(dbias), static_cast<A*>(dgamma), static_cast<A*>(dbeta)}};
    }

  private:
    Vec<A> over_chunks(const A* first) const {
        Vec<A> total = load(first);
        for (std::int64_t i = 1; i < chunks; ++i) total += load(first + i * size(C, taps));
        return total;
    }
    static void sum_block(std::int64_t block, char*, void* context) {
        const Sum& targets = *static_cast<const Sum*>(context);
        const Partials& p = *targets.partials;
        const std::int64_t c = block * L, lanes = p.C - c < L ? p.C - c : L;
        for (int tap = 0; targets.weight != nullptr && tap < p.taps; ++tap) {
            const Vec<A> total = p.over_chunks(p.weight(0, block) + (p.taps - 1 - tap) * L);
            for (std::int64_t i = 0; i < lanes; ++i) {
                targets.weight[(c + i) * p.taps + tap] = total[i];
            }
        }
        for (int which = 0; which < kVectors; ++which) {
            if (targets.vectors[which] == nullptr) continue;
            const Vec<A> total = p.over_chunks(p.vector(0, static_cast<Vector>(which)) + c);
            for (std::int64_t i = 0; i < lanes; ++i) targets.vectors[which][c + i] = total[i];
        }
    }
};

// The sum of a weight's gradient, [rows][columns] in whole vectors.
template <class A>
struct WeightSum {
    A* gradient;  // null: not needed
    std::int64_t rows, columns, stride;
    A* sum;

    static WeightSum plan(void* gradient, std::int64_t rows, std::int64_t columns) {
        return {static_cast<A*>(gradient), rows, columns, padded_channels<A>(columns), nullptr};
    }
    bool direct() const { return stride == columns; }
    void take(Carver& carver) {
        A* own = carver.take<A>(gradient == nullptr || direct() ? 0 : rows * stride);
        sum = direct() ? gradient : own;
    }
    void write() const {
        if (gradient == nullptr || direct()) return;
        for (std::int64_t r = 0; r < rows; ++r) {
            for (std::int64_t c = 0; c < columns; ++c) {
                gradient[r * columns + c] = sum[r * stride + c];
            }
        }
    }
};

}  // namespace
}  // namespace convnest::CONVNEST_ISA
