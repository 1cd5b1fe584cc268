// The forward pass of nested_block on a few small images at once; the formula is in nested_block.h.
//
// Where a map is small and its block wide, the weights are what moves: megabytes a layer, for 49 or
// 196 pixels an image. So a group of images passes each layer together, and threads share the
// channels, not the images: a slice is a run of panels of D.
//
//   slices    h = x W1^T + b1, g = GELU(h), the mean of g over the slice and its squares
//   pixels    mean and rstd over all slices, in their order
//   slices    one vector of channels after the other: z = LN(g), u = [g +] DW(z) + b, v = GELU(u)
//   halves    t = v W2^T + b2, of half of the slices each, slice by slice, so that the weights are
//             read once a group; by panels of C where there are more threads
//   pixels    y = s x + LN(t)
//
// Each line is a phase of each group (nested_block_groups.h), and a call goes to the thread pool
// once.
// No value depends on how the work is cut among threads, nor on what is in a group. Backward uses
// the first three to compute h and u again.
#pragma once

#include "nested_block_groups.h"
#include "nested_block_rows.h"

namespace convnest::CONVNEST_ISA {
namespace {

template <class T>
struct NestedBlockSlices {
    using A = Accumulate<T>;
    using E = typename OperandOf<T>::type;
    using Tap = typename TapOf<T>::type;
    static constexpr int L = kLanes<A>;
    static constexpr std::int64_t kStride = Slices<A>::kStride;

    const NestedBlockFwdParams& p;
    NestedBlockRows<T> rows;  // the parameters, and what is done to a pixel
    Slices<A> slices;
    Groups groups;
    std::int64_t most;  // pixels of a group
    // Of a group; wide ones are [slice][pixel][kStride].
    A* g;
    E* v;       // takes the place of g where it has its type
    E* x;       // [pixel][Cp], unless the first layer can read the tensor itself
    A *t, *t2;  // [pixel][Cp]
    A *slice_mean, *slice_squares;  // [slice][pixel]
    A *mean, *rstd;                 // [pixel]

    using Group = Groups::Group;

    static NestedBlockSlices plan(const NestedBlockFwdParams& p) {
        const auto groups = Groups::plan(p.N, p.H, p.W);
        return {p,
                NestedBlockRows<T>::plan(p),
                {p.D},
                groups,
                groups.most(),
                {},
                {},
                {},
                {},
                {},
                {},
                {},
                {},
                {}};
    }

    // Memory of the call.
    void take_memory(Carver& carver) {
        const std::int64_t wide = slices.count() * most * kStride;
        g = carver.take<A>(wide);
        if constexpr (std::is_same<A, E>::value) {
            v = g;
        } else {
            v = carver.take<E>(wide);
        }
        x = carver.take<E>(rows.reads_x() ? 0 : most * rows.narrow);
        for (A** at : {&t, &t2}) *at = carver.take<A>(most * rows.narrow);
        slice_mean = carver.take<A>(slices.count() * most);
        slice_squares = carver.take<A>(slices.count() * most);
        mean = carver.take<A>(most);
        rstd = carver.take<A>(most);
    }

    // f(group, slice, pixels, scratch) for all images of a group, or for fewer on many threads.
    template <class F>
    auto over_slices(std::size_t scratch_bytes, const F& f) const {
        const std::int64_t threads = num_threads(), count = slices.count();
        const std::int64_t wanted = (2 * threads + count - 1) / count;
        const std::int64_t parts = wanted < groups.images ? wanted : groups.images;
        const auto part = [this, parts, f](std::int64_t index, std::int64_t unit, char* scratch) {
            const Group group = groups.at(index);
            const Range images = part_of(group.pixels / groups.size, parts, unit % parts);
            const Range pixels{images.begin * groups.size, images.end * groups.size};
            f(group, slices.at(unit / parts), pixels, scratch);
        };
        return GroupPhase(count * parts, scratch_bytes, part);
    }

    // All groups after what is in `work`. h and u are kept where they are not null.
    void run(Phases& work, T* h, T* u) {
        const auto of = [this](T* tensor, const Group& group) {
            return tensor == nullptr ? nullptr : tensor + group.first * p.D;
        };
        const auto convert = convert_x();
        const auto enter =
            over_slices(0, [&](const Group& group, const auto& slice, Range pixels, char*) {
                enter_slice(group, slice, pixels, of(h, group), nullptr, true);
            });
        const auto finish = groups.over_pixels(
            [this](const Group& group, std::int64_t, Range pixels) { statistics(group, pixels); });
        const auto convolve = over_slices(
            conv_bytes(), [&](const Group& group, const auto& slice, Range pixels, char* scratch) {
                convolve_slice(slice, pixels, mean, rstd, of(u, group), scratch);
            });
        const LinearOfSlices<E> fc2{
            groups,
            slices,
            v,
            {nullptr, 0, rows.fc2_weight, rows.fc2_bias, t, rows.narrow, 0, p.D, p.C},
            t2};
        const auto reduce = fc2.phase();
        const auto leave = groups.over_pixels([&](const Group& group, std::int64_t, Range pixels) {
            for (std::int64_t i = pixels.begin; i < pixels.end; ++i) {
                rows.leave_pixel(fc2.add_halves(i), group.first + i);
            }
        });
        for (std::int64_t i = 0; i < groups.count(); ++i) {
            if (!rows.reads_x()) work.add(convert.of(i));
            for (const Units& units :
                 {enter.of(i), finish.of(i), convolve.of(i), reduce.of(i), leave.of(i)}) {
                work.add(units);
            }
        }
        work.run();
    }

    auto convert_x() const {
        return groups.over_pixels([this](const Group& group, std::int64_t, Range pixels) {
            convert_pixels(group, pixels);
        });
    }
    void convert_pixels(const Group& group, Range pixels) const {
        const T* in = static_cast<const T*>(p.x) + group.first * p.C;
        for (std::int64_t i = pixels.begin; i < pixels.end; ++i) {
            over_channels<A>(p.C, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                store_operand(x + i * rows.narrow + c, load_as(in + i * p.C + c, lanes));
            });
        }
    }

    // g, from h where it is given, and its statistics over the slice.
    void enter_slice(const Group& group, const typename Slices<A>::Slice& slice, Range pixels,
                     T* kept_h, const T* h, bool statistics) const {
        A* out = g + slice.index * most * kStride;
        if (h == nullptr) {
            LinearRows<E> layer{x + pixels.begin * rows.narrow,
                                rows.narrow,
                                rows.fc1_weight,
                                rows.fc1_bias,
                                out + pixels.begin * kStride,
                                kStride,
                                pixels.end - pixels.begin,
                                p.C,
                                p.D};
            if (rows.reads_x()) {
                layer.x = static_cast<const E*>(p.x) + (group.first + pixels.begin) * p.C;
                layer.x_stride = p.C;
            }
            linear_part(layer, slice.panels, {0, packed_steps<E>(p.C)});
        }
        for (std::int64_t i = pixels.begin; i < pixels.end; ++i) {
            A* row = out + i * kStride;
            ChannelSum<A> sum, squares;
            over_channels<A>(
                slice.channels, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                    const std::int64_t at = i * p.D + slice.c + c;
                    const auto value = h == nullptr ? rounded_to<T>(load_all(row + c, lanes))
                                                    : load_as(h + at, lanes);
                    if (kept_h != nullptr) store_as(kept_h + at, value, lanes);
                    const auto gelu = gelu_of<T>(value);
                    store_all(row + c, gelu);
                    sum.add(gelu);
                });
            if (!statistics) continue;
            const A centre = sum.total() / static_cast<A>(slice.channels);
            over_channels<A>(
                slice.channels, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                    const auto centred = zero_others(load_all(row + c, lanes) - centre, lanes);
                    squares.add(centred * centred);
                });
            slice_mean[slice.index * most + i] = centre;
            slice_squares[slice.index * most + i] = squares.total();
        }
    }

    // From those of the slices: squares about the whole mean are those about the slice's own and
    // n (slice mean - mean)^2, so nothing cancels.
    void statistics(const Group& group, Range pixels) const {
        for (std::int64_t i = pixels.begin; i < pixels.end; ++i) mean[i] = rstd[i] = 0;
        const A each = A(1) / static_cast<A>(p.D);
        for (std::int64_t s = 0; s < slices.count(); ++s) {
            const A share = static_cast<A>(slices.at(s).channels) * each;
            for (std::int64_t i = pixels.begin; i < pixels.end; ++i) {
                mean[i] += slice_mean[s * most + i] * share;
            }
        }
        for (std::int64_t s = 0; s < slices.count(); ++s) {
            const A channels = static_cast<A>(slices.at(s).channels);
            for (std::int64_t i = pixels.begin; i < pixels.end; ++i) {
                const A off = slice_mean[s * most + i] - mean[i];
                rstd[i] += slice_squares[s * most + i] + channels * (off * off);
            }
        }
        for (std::int64_t i = pixels.begin; i < pixels.end; ++i) {
            rstd[i] = A(1) / square_root(rstd[i] * each + static_cast<A>(p.eps));
            if (p.mean != nullptr) static_cast<A*>(p.mean)[group.first + i] = mean[i];
            if (p.rstd != nullptr) static_cast<A*>(p.rstd)[group.first + i] = rstd[i];
        }
    }

    // One vector of channels of an image: z with its padding, and the convolution of it.
    struct Conv {
        Ring<Tap> z;
        A* out;  // [H][W][L]
    };
    Conv take_conv(Carver& carver) const {
        Conv conv{rows.wide.step.take_map(carver), {}};
        conv.out = carver.take<A>(p.H * p.W * L);
        return conv;
    }
    std::size_t conv_bytes() const {
        Carver carver(nullptr);
        take_conv(carver);
        return carver.used();
    }

    // u (where it is kept) and v of a slice.
    void convolve_slice(const typename Slices<A>::Slice& slice, Range pixels, const A* means,
                        const A* rstds, T* kept_u, char* scratch) const {
        Carver carver(scratch);
        const Conv conv = take_conv(carver);
        conv.z.clear_padding();
        const RingRows<Tap> map(conv.z, 0, 0, p.H);
        for (std::int64_t b = 0; b < slice.vectors; ++b) {
            const std::int64_t c = slice.c + b * L, left = p.D - c;
            const A* in = g + slice.index * most * kStride + b * L;
            const Vec<A> gamma = load(rows.wide.ln_weight + c), beta = load(rows.wide.ln_bias + c);
            for (std::int64_t image = pixels.begin; image < pixels.end; image += p.H * p.W) {
                std::int64_t i = image;
                for (std::int64_t y = 0; y < p.H; ++y) {
                    Tap* z = conv.z.row(0, y) + conv.z.pad * L;
                    const auto place = conv.z.place(y, 0);
                    for (std::int64_t w = 0; w < p.W; ++w, ++i) {
                        place.put(z + w * L,
                                  (load(in + i * kStride) - means[i]) * rstds[i] * gamma + beta);
                    }
                }
                rows.wide.kernels.conv_rows({map.pointers, map.begin, map.end,
                                             rows.wide.weight + c / L * tap_elements<Tap>(p.K),
                                             conv.out, p.W * L, L, p.H, p.W, rows.wide.step.tiles});
                over_pixels(p.H * p.W, [&](std::int64_t pixel, auto count) CONVNEST_INLINE_LAMBDA {
                    leave_pixels<decltype(count)::value>(slice, image + pixel, b, left,
                                                         conv.out + pixel * L, kept_u);
                });
            }
        }
    }

    // f(pixel, pixels at once): GELU of a single vector would wait for itself.
    template <class F>
    CONVNEST_INLINE void over_pixels(std::int64_t pixels, F&& f) {
        std::int64_t i = 0;
        for (; i + kPack <= pixels; i += kPack) f(i, Constant<kPack>{});
        for (; i < pixels; ++i) f(i, Constant<1>{});
    }

    // One vector of N pixels from the convolution on.
    template <int N>
    CONVNEST_INLINE_LAMBDA void leave_pixels(const typename Slices<A>::Slice& slice, std::int64_t i,
                                             std::int64_t b, std::int64_t left, const A* conv,
                                             T* kept_u) const {
        const std::int64_t at = (slice.index * most + i) * kStride + b * L, c = slice.c + b * L;
        const Vec<A> bias = load(rows.wide.conv_bias + c);
        const auto u = make_pack<A, N>([&](auto n) CONVNEST_INLINE_LAMBDA {
            const Vec<A> sum = load(conv + n * L) + bias;
            return p.shortcut ? sum + load(g + at + n * kStride) : sum;
        });
        if (kept_u != nullptr) {
            unroll<N>([&](auto n) CONVNEST_INLINE_LAMBDA {
                T* out = kept_u + (i + n) * p.D + c;
                const Pack<A, 1> one{{u.v[n]}};
                if (left >= L) {
                    store_as(out, one, AllLanes<1>{});
                } else {
                    store_as(out, one, FirstLanes{static_cast<int>(left)});
                }
            });
        }
        const auto value = gelu_of<T>(u);
        unroll<N>([&](auto n) CONVNEST_INLINE_LAMBDA {
            store_rounded<T>(v + at + n * kStride, Pack<A, 1>{{value.v[n]}});
        });
    }
};

}  // namespace
}  // namespace convnest::CONVNEST_ISA
