// How nested_block is cut on small maps (nested_block_slices.h): slices of channels, groups of
// images, the phases of a group (common/parallel.h), and a layer that sums over slices.
#pragma once

#include "common/parallel.h"
#include "common/partition.h"
#include "linear_rows.h"

namespace convnest::CONVNEST_ISA {
namespace {

// The cut of D wide channels into slices.
template <class A>
struct Slices {
    static constexpr int L = kLanes<A>;
    // From one pixel to the next of a slice in memory: an odd number of cache lines for float.
    static constexpr std::int64_t kStride = kSliceChannels;
    static constexpr std::int64_t kPanels = kStride / (kPanel * L);
    static_assert(kPanels * kPanel * L == kStride, "whole panels");

    std::int64_t D;
    std::int64_t panels() const { return panel_count(block_count<A>(D)); }
    std::int64_t count() const { return (panels() + kPanels - 1) / kPanels; }

    struct Slice {
        std::int64_t index;
        Range panels;
        std::int64_t c, vectors, channels;  // from channel c on; vectors are whole
        template <class E>
        Range steps() const {
            return {c / Operand<E>::kStep, packed_steps<E>(c + channels)};
        }
    };
    Slice at(std::int64_t s) const {
        const std::int64_t blocks = block_count<A>(D), first = s * kPanels;
        const std::int64_t end = first + kPanels < panels() ? first + kPanels : panels();
        const Panel last = panel_at(blocks, end - 1);
        const std::int64_t v = panel_at(blocks, first).first;
        const std::int64_t vectors = last.first + last.vectors - v, left = D - v * L;
        return {s, {first, end}, v * L, vectors, left < vectors * L ? left : vectors * L};
    }
};

// A phase that comes once in each group: f(group, unit, scratch) for `count` units of it.
template <class F>
struct GroupPhase {
    std::int64_t count;
    std::size_t scratch_bytes;
    F f;

    GroupPhase(std::int64_t count, std::size_t scratch_bytes, const F& f)
        : count(count), scratch_bytes(scratch_bytes), f(f) {}

    static void run(std::int64_t unit, char* scratch, void* context) {
        const GroupPhase& phase = *static_cast<const GroupPhase*>(context);
        phase.f(unit / phase.count, unit % phase.count, scratch);
    }
    // To be run while the phase exists.
    Units of(std::int64_t group) const {
        return {count, scratch_bytes, nullptr, run, const_cast<GroupPhase*>(this), group * count};
    }
};

// The images of a batch, a few at a time.
struct Groups {
    std::int64_t N, size;  // images, pixels of an image
    std::int64_t images;   // of the largest group
    struct Group {
        std::int64_t first, pixels;  // of the tensors' pixels
    };

    static Groups plan(std::int64_t N, std::int64_t H, std::int64_t W) {
        return {N, H * W, images_of_group(N, H, W)};
    }
    std::int64_t count() const { return (N + images - 1) / images; }
    std::int64_t most() const { return images * size; }  // pixels
    Group at(std::int64_t i) const {
        const Range range = part_of(N, count(), i);
        return {range.begin * size, (range.end - range.begin) * size};
    }
    static std::int64_t row_parts(std::int64_t pixels) {
        return (pixels + kLeastRows - 1) / kLeastRows;
    }

    // f(group, unit, its pixels) for kLeastRows pixels or fewer; units are of the shape only.
    template <class F>
    auto over_pixels(const F& f) const {
        const auto part = [groups = *this, f](std::int64_t index, std::int64_t unit, char*) {
            const Group group = groups.at(index);
            const std::int64_t parts = row_parts(group.pixels);
            if (unit < parts) f(group, unit, part_of(group.pixels, parts, unit));
        };
        return GroupPhase(row_parts(most()), 0, part);
    }
};

// A layer with slices as its input: y[i, m] = bias[m] + sum over all slices. Each half of the
// slices has a sum of its own, the second one's in y2, so that a thread reads those that it has
// written.
template <class E>
struct LinearOfSlices {
    using A = Accumulate<E>;
    static constexpr int kHalves = 2;

    Groups groups;
    Slices<A> slices;
    const E* x;
    LinearRows<E> layer;
    A* y2;

    // By halves, and for more threads by panels and rows.
    auto phase() const {
        const std::int64_t panels = panel_count(block_count<A>(layer.M));
        const std::int64_t threads = (num_threads() + kHalves - 1) / kHalves;
        const std::int64_t columns = panels < threads ? panels : threads;
        const std::int64_t wanted = (threads + columns - 1) / columns;
        const std::int64_t rows = wanted * kLeastRows <= groups.most() ? wanted : 1;
        const auto part = [=, l = *this](std::int64_t group, std::int64_t unit, char*) {
            const std::int64_t within = unit % (columns * rows);
            l.run(unit / (columns * rows), part_of(panels, columns, within / rows),
                  part_of(l.groups.at(group).pixels, rows, within % rows));
        };
        return GroupPhase(kHalves * columns * rows, 0, part);
    }

    void run(std::int64_t half, Range panels, Range rows) const {
        const std::int64_t blocks = block_count<A>(layer.M),
                           first = panel_at(blocks, panels.begin).first;
        LinearRows<E> part = layer;
        part.rows = rows.end - rows.begin;
        part.x_stride = slices.kStride;
        part.y = (half == 0 ? layer.y : y2) + rows.begin * layer.y_stride + first * kLanes<A>;
        if (half != 0) {
            const Panel last = panel_at(blocks, panels.end - 1);
            const std::int64_t columns = (last.first + last.vectors - first) * kLanes<A>;
            for (std::int64_t i = 0; i < part.rows; ++i) {
                for (std::int64_t c = 0; c < columns; ++c) part.y[i * layer.y_stride + c] = 0;
            }
        }
        const Range mine = part_of(slices.count(), kHalves, half);
        for (std::int64_t s = mine.begin; s < mine.end; ++s) {
            part.x = x + (s * groups.most() + rows.begin) * slices.kStride;
            linear_part(part, panels, slices.at(s).template steps<E>());
        }
    }

    // y of a pixel, whole.
    A* add_halves(std::int64_t pixel) const {
        A* y = layer.y + pixel * layer.y_stride;
        const A* second = y2 + pixel * layer.y_stride;
        for (std::int64_t c = 0; c < layer.y_stride; ++c) y[c] += second[c];
        return y;
    }
};

}  // namespace
}  // namespace convnest::CONVNEST_ISA
