// nested_block backward on a few small images at once; the formulas are in
// nested_block_bwd_cpu.cpp, slices and groups in nested_block_slices.h.
//
//   pixels    dt, and the sums of narrow gradients
//   [slices   h and u, where they were not kept: forward's own code]
//   slices    dv = dt W2, du, dW2, the gradients of the convolution and the norm, dg up to the
//             means over channels, and the slice's share of these
//   pixels    the means over channels
//   slices    dh, dW1, db1
//   halves    dh W1
//   pixels    dx
//
// Each line is a phase of each group, as in forward. A slice's gradients belong to one unit in each
// group, and groups come in order: one sum for each gradient, in memory of the gradient itself
// where its rows are whole vectors, in the same order for every number of threads.
#include "common/call.h"
#include "nested_block_bwd_pixel.h"
#include "nested_block_bwd_slices.h"
#include "nested_block_slices.h"
#include "nested_conv_bwd_rows.h"

namespace convnest::CONVNEST_ISA {
namespace {

template <class T>
struct BackwardSlices {
    using A = Accumulate<T>;
    using E = typename OperandOf<T>::type;
    using Packed = typename Operand<E>::Packed;
    using Tap = typename TapOf<T>::type;
    using Slice = typename Slices<A>::Slice;
    using Group = Groups::Group;
    static constexpr int L = kLanes<A>;
    static constexpr std::int64_t kStride = Slices<A>::kStride;
    static constexpr bool kOwnOperands = !std::is_same<A, E>::value;

    const NestedBlockBwdParams& p;
    NestedBlockBwdPixel<T> pixel;
    NestedBlockSlices<T> again;
    NestedConvBwdRows<T> wide;  // its parameters and partial sums
    WeightSum<A> fc1, fc2;
    Packed *fc1_weight{}, *fc2_weight{};  // of the input gradients
    A *no_bias{}, *fc1_bias{}, *narrow_sums{};

    // Of a group. Wide ones are [slice][pixel][kStride], narrow ones [pixel][Cp].
    T *h{}, *u{};  // [pixel][D], where they are computed again
    A *dg{}, *xhat{}, *slope{};
    A *dt{}, *x{}, *through{}, *through2{};
    E *dt_operand{}, *dh_operand{};
    A* unit_sums{};             // of narrow gradients, for each unit
    A *slice_e{}, *slice_ex{};  // [slice][pixel]
    A *mean_e{}, *mean_ex{};    // [pixel]

    std::int64_t narrow() const { return pixel.narrow; }
    // Whether x is a factor of dW1 as it is.
    bool reads_x() const { return std::is_same<T, A>::value && p.C == narrow(); }
    bool wants_fc1() const { return fc1.gradient != nullptr || p.dfc1_bias != nullptr; }

    void take_parameters(Carver& carver) {
        wide.take_parameters(carver, 1);
        pixel.take_parameters(carver);
        if (p.u == nullptr) again.rows.take_parameters(carver);
        fc1_weight = carver.take<Packed>(packed_elements<E>(p.D, p.C));
        fc2_weight = carver.take<Packed>(packed_elements<E>(p.C, p.D));
        no_bias = carver.take<A>(wide.step.channels);
        fc1_bias = carver.take<A>(wide.step.channels);
        narrow_sums = carver.take<A>(pixel.sums());
        fc1.take(carver);
        fc2.take(carver);
    }
    void copy_parameters(Phases& work) {
        wide.copy_parameters(p.norm_weight, p.norm_bias);
        pixel.copy_parameters();
        if (p.u == nullptr) again.rows.copy_parameters(work);
        for (std::int64_t i = 0; i < wide.step.channels; ++i) no_bias[i] = fc1_bias[i] = 0;
        for (std::int64_t i = 0; i < pixel.sums(); ++i) narrow_sums[i] = 0;
    }

    void take_memory(Carver& carver) {
        const std::int64_t most = again.most, slices = again.slices.count();
        const std::int64_t all = slices * most * kStride;
        if (p.u == nullptr) again.take_memory(carver);
        h = carver.take<T>(p.h == nullptr ? most * p.D : 0);
        u = carver.take<T>(p.u == nullptr ? most * p.D : 0);
        for (A** at : {&dg, &xhat, &slope}) *at = carver.take<A>(all);
        dt = carver.take<A>(most * narrow());
        x = carver.take<A>(reads_x() ? 0 : most * narrow());
        for (A** at : {&through, &through2}) *at = carver.take<A>(most * narrow());
        dt_operand = carver.take<E>(kOwnOperands ? most * narrow() : 0);
        dh_operand = carver.take<E>(kOwnOperands ? all : 0);
        if constexpr (!kOwnOperands) {
            dt_operand = dt;
            dh_operand = dg;
        }
        unit_sums = carver.take<A>(Groups::row_parts(most) * pixel.sums());
        for (A** at : {&slice_e, &slice_ex}) *at = carver.take<A>(slices * most);
        for (A** at : {&mean_e, &mean_ex}) *at = carver.take<A>(most);
    }

    // A worker's memory, for a slice.
    struct Scratch {
        A* v;  // [pixel][kStride]: GELU(u)
        Ring<Tap> du;
        Tap* z;    // [H][tiles][L], zero from W on
        A* dz;     // [H][W][L]
        A* sum_e;  // [pixel][L]
        A* sum_ex;
        std::uint32_t* pairs;  // of the factors of the weight gradients
    };
    Scratch take_scratch(Carver& carver) const {
        Scratch s;
        s.du = wide.step.take_map(carver);
        s.dz = carver.take<A>(p.H * p.W * L);
        s.v = carver.take<A>(again.most * kStride);
        s.z = carver.take<Tap>(wide.step.in_elements(p.H));
        s.sum_e = carver.take<A>(again.most * L);
        s.sum_ex = carver.take<A>(again.most * L);
        s.pairs = carver.take<std::uint32_t>(
            kOwnOperands ? pair_elements(again.most, kStride, narrow()) : 0);
        return s;
    }

    void run(Phases& work) {
        auto conv = wide.weight_copy(p.conv_weight);
        PackLinear<E> pack1{static_cast<const A*>(p.fc1_weight), 1, p.C, fc1_weight, p.D, p.C};
        PackLinear<E> pack2{static_cast<const A*>(p.fc2_weight), 1, p.D, fc2_weight, p.C, p.D};
        for (const Units& units : {conv.units(), pack_units(pack1), pack_units(pack2)}) {
            work.add(units);
        }

        const auto enter_pixels = again.groups.over_pixels([this](const Group& group,
                                                                  std::int64_t unit, Range pixels) {
            A* sums = unit_sums + unit * pixel.sums();
            for (std::int64_t i = 0; i < pixel.sums(); ++i) sums[i] = 0;
            for (std::int64_t i = pixels.begin; i < pixels.end; ++i) {
                pixel.enter(group.first + i, dt + i * narrow(), dt_operand + i * narrow(), sums);
            }
        });
        const auto convert = again.convert_x();
        const auto enter_again = again.over_slices(
            0, [this](const Group& group, const Slice& slice, Range pixels, char*) {
                again.enter_slice(group, slice, pixels, p.h == nullptr ? h : nullptr,
                                  wide_of(p.h, group, nullptr), false);
            });
        const auto convolve_again = again.over_slices(
            again.conv_bytes(),
            [this](const Group& group, const Slice& slice, Range pixels, char* scratch) {
                again.convolve_slice(slice, pixels, mean(group), rstd(group), u, scratch);
            });
        const auto enter =
            over_whole_slices([this](const Group& group, const Slice& slice, char* scratch) {
                Carver carver(scratch);
                enter_slice(take_scratch(carver), group, slice);
            });
        const auto finish =
            again.groups.over_pixels([this](const Group& group, std::int64_t unit, Range pixels) {
                finish_sums(pixels, rstd(group));
                if (fc1.gradient != nullptr && !reads_x()) copy_x(group, pixels);
                if (unit == 0) add_narrow_sums(group);
            });
        const auto leave =
            over_whole_slices([this](const Group& group, const Slice& slice, char* scratch) {
                Carver carver(scratch);
                leave_slice(take_scratch(carver), group, slice);
            });
        const LinearOfSlices<E> fc1_transposed{
            again.groups,
            again.slices,
            dh_operand,
            {nullptr, 0, fc1_weight, no_bias, through, narrow(), 0, p.D, p.C},
            through2};
        const auto reduce = fc1_transposed.phase();
        const auto leave_pixels =
            again.groups.over_pixels([&](const Group& group, std::int64_t, Range pixels) {
                for (std::int64_t i = pixels.begin; i < pixels.end; ++i) {
                    pixel.leave(group.first + i, fc1_transposed.add_halves(i));
                }
            });
        for (std::int64_t i = 0; i < again.groups.count(); ++i) {
            work.add(enter_pixels.of(i));
            if (p.u == nullptr) {
                if (p.h == nullptr && !again.rows.reads_x()) work.add(convert.of(i));
                work.add(enter_again.of(i));
                work.add(convolve_again.of(i));
            }
            work.add(enter.of(i));
            work.add(finish.of(i));
            if (wants_fc1() || p.dx != nullptr) work.add(leave.of(i));
            if (p.dx != nullptr) work.add(reduce.of(i));
            if (p.dx != nullptr) work.add(leave_pixels.of(i));
        }
        auto sum =
            wide.partials.sum_into(p.dconv_weight, p.dconv_bias, p.dnorm_weight, p.dnorm_bias);
        work.add(sum.units());
        work.run();
    }

    // f(group, slice, scratch).
    template <class F>
    auto over_whole_slices(const F& f) const {
        const std::size_t bytes = bytes_of([this](Carver& carver) { take_scratch(carver); });
        const auto run = [this, f](std::int64_t group, std::int64_t s, char* base) {
            f(again.groups.at(group), again.slices.at(s), base);
        };
        return GroupPhase(again.slices.count(), bytes, run);
    }

    // What the tensors have of a group; `made` where a wide one was not kept.
    const T* wide_of(const void* tensor, const Group& group, const T* made) const {
        return tensor == nullptr ? made : static_cast<const T*>(tensor) + group.first * p.D;
    }
    const A* mean(const Group& group) const { return static_cast<const A*>(p.mean) + group.first; }
    const A* rstd(const Group& group) const { return static_cast<const A*>(p.rstd) + group.first; }

    // In the order of the units.
    void add_narrow_sums(const Group& group) const {
        const std::int64_t all = Groups::row_parts(group.pixels) * pixel.sums();
        for (std::int64_t i = 0; i < all; ++i) narrow_sums[i % pixel.sums()] += unit_sums[i];
    }

    // Lanes from C on are zero: columns of dW1 come in whole vectors.
    void copy_x(const Group& group, Range pixels) const {
        for (std::int64_t i = pixels.begin; i < pixels.end; ++i) {
            for (std::int64_t c = p.C; c < narrow(); ++c) x[i * narrow() + c] = 0;
        }
        pixel.copy_x(group.first + pixels.begin, pixels.end - pixels.begin,
                     x + pixels.begin * narrow(), narrow());
    }

    A* of(A* buffer, const Slice& slice) const {
        return buffer + slice.index * again.most * kStride;
    }

    void enter_slice(const Scratch& s, const Group& group, const Slice& slice) const {
        const std::int64_t pixels = group.pixels;
        const T *h_ = wide_of(p.h, group, h), *u_ = wide_of(p.u, group, u);
        const A *means = mean(group), *rstds = rstd(group);
        A *dg_ = of(dg, slice), *xhat_ = of(xhat, slice), *slope_ = of(slope, slice);
        if (group.first == 0) wide.partials.clear(0, slice.c / L, slice.vectors);
        linear_part(LinearRows<E>{dt_operand, narrow(), fc2_weight, no_bias, dg_, kStride, pixels,
                                  p.C, p.D},
                    slice.panels, {0, packed_steps<E>(p.C)});
        for (std::int64_t i = 0; i < pixels; ++i) {
            const std::int64_t row = i * kStride;
            over_channels<A>(
                slice.channels, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                    const auto v = gelu_and_grad_of<T>(load_as(u_ + i * p.D + slice.c + c, lanes));
                    store_all(dg_ + row + c, load_all(dg_ + row + c, lanes) * v.grad);
                    store_all(s.v + row + c, rounded_to<T>(v.value));
                });
            over_channels<A>(
                slice.channels, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                    const auto g = gelu_and_grad_of<T>(load_as(h_ + i * p.D + slice.c + c, lanes));
                    store_all(xhat_ + row + c, (g.value - means[i]) * rstds[i]);
                    store_all(slope_ + row + c, g.grad);
                });
        }
        if (fc2.gradient != nullptr) {
            outer_rows_of<T>({dt, narrow(), s.v, kStride, fc2.sum + slice.c, fc2.stride, pixels,
                              p.C, slice.vectors * L, group.first == 0},
                             s.pairs);
        }
        s.du.clear_padding();
        for (std::int64_t i = 0; i < wide.step.in_elements(p.H); ++i) s.z[i] = 0;
        for (std::int64_t i = 0; i < pixels * L; ++i) s.sum_e[i] = s.sum_ex[i] = 0;
        const RingRows<Tap> map(s.du, 0, 0, p.H);
        for (std::int64_t b = 0; b < slice.vectors; ++b) {
            for (std::int64_t image = 0; image < pixels; image += p.H * p.W) {
                convolve(s, map, slice.c + b * L, image, dg_ + b * L, xhat_ + b * L, rstds);
            }
        }
        for (std::int64_t i = 0; i < pixels; ++i) {
            slice_e[slice.index * again.most + i] = lane_sum<A>(load(s.sum_e + i * L));
            slice_ex[slice.index * again.most + i] = lane_sum<A>(load(s.sum_ex + i * L));
        }
    }

    // One vector of channels of an image: the gradients of the convolution and of the norm, sums,
    // and dg up to the means over channels in the place of du.
    void convolve(const Scratch& s, const RingRows<Tap>& map, std::int64_t c, std::int64_t image,
                  A* dg_, const A* xhat_, const A* rstd) const {
        const std::int64_t block = c / L, size = p.H * p.W;
        const Vec<A> gamma = load(wide.ln_weight + c), beta = load(wide.ln_bias + c);
        Vec<A> dbias = {}, dgamma = {}, dbeta = {};
        std::int64_t at = image * kStride;
        for (std::int64_t y = 0; y < p.H; ++y) {
            Tap* du = s.du.row(0, y) + s.du.pad * L;
            Tap* z = wide.step.in_row(s.z, y, 0);
            const auto du_place = s.du.place(y, 0), z_place = Place<Tap>::of_row(y, 0);
            for (std::int64_t w = 0; w < p.W; ++w, at += kStride) {
                const Vec<A> value = load(dg_ + at);
                dbias += value;
                du_place.put(du + w * L, value);
                z_place.put(z + w * L, load(xhat_ + at) * gamma + beta);
            }
        }
        if (wide.wanted.conv_weight) {
            wide.kernels.weight_rows({map.pointers, map.begin, map.end, s.z,
                                      wide.partials.weight(0, block), p.H, p.W, wide.step.tiles});
        }
        wide.kernels.conv_rows({map.pointers, map.begin, map.end,
                                wide.weight_flip + block * tap_elements<Tap>(p.K), s.dz, p.W * L, L,
                                p.H, p.W, wide.step.tiles});
        for (std::int64_t i = 0; i < size; ++i) {
            const std::int64_t pixel_ = image + i;
            const Vec<A> dz = load(s.dz + i * L), e = dz * gamma;
            const Vec<A> xhat = load(xhat_ + pixel_ * kStride);
            dgamma += dz * xhat;
            dbeta += dz;
            store(s.sum_e + pixel_ * L, load(s.sum_e + pixel_ * L) + e);
            store(s.sum_ex + pixel_ * L, load(s.sum_ex + pixel_ * L) + e * xhat);
            A* dg = dg_ + pixel_ * kStride;
            const Vec<A> through = rstd[pixel_] * e;
            store(dg, p.shortcut ? through + load(dg) : through);
        }
        wide.partials.add(0, wide.partials.kBias, c, dbias);
        wide.partials.add(0, wide.partials.kGamma, c, dgamma);
        wide.partials.add(0, wide.partials.kBeta, c, dbeta);
    }

    // The means over channels, times rstd.
    void finish_sums(Range pixels, const A* rstd) const {
        for (std::int64_t i = pixels.begin; i < pixels.end; ++i) mean_e[i] = mean_ex[i] = 0;
        for (std::int64_t s = 0; s < again.slices.count(); ++s) {
            for (std::int64_t i = pixels.begin; i < pixels.end; ++i) {
                mean_e[i] += slice_e[s * again.most + i];
                mean_ex[i] += slice_ex[s * again.most + i];
            }
        }
        for (std::int64_t i = pixels.begin; i < pixels.end; ++i) {
            const A scale = rstd[i] / static_cast<A>(p.D);
            mean_e[i] *= scale;
            mean_ex[i] *= scale;
        }
    }

    void leave_slice(const Scratch& s, const Group& group, const Slice& slice) const {
        const std::int64_t pixels = group.pixels;
        A *dg_ = of(dg, slice), *xhat_ = of(xhat, slice), *slope_ = of(slope, slice);
        E* operand = dh_operand + slice.index * again.most * kStride;
        A* bias = fc1_bias + slice.c;
        for (std::int64_t i = 0; i < pixels; ++i) {
            over_channels<A>(
                slice.channels, [&](std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                    const std::int64_t at = i * kStride + c;
                    const auto sum = load_all(dg_ + at, lanes) - mean_e[i] -
                                     load_all(xhat_ + at, lanes) * mean_ex[i];
                    const auto dh =
                        rounded_to<T>(zero_others(sum * load_all(slope_ + at, lanes), lanes));
                    store_all(dg_ + at, dh);
                    if constexpr (kOwnOperands) store_operand(operand + at, dh);
                    store_all(bias + c, load_all(bias + c, lanes) + dh);
                });
        }
        if (fc1.gradient == nullptr) return;
        const A* factor = reads_x() ? static_cast<const A*>(p.x) + group.first * p.C : x;
        outer_rows_of<T>({dg_, kStride, factor, narrow(), fc1.sum + slice.c * fc1.stride,
                          fc1.stride, pixels, slice.channels, narrow(), group.first == 0},
                         s.pairs);
    }

    void write_gradients() const {
        fc1.write();
        fc2.write();
        pixel.copy_to(p.dfc1_bias, fc1_bias, p.D);
        pixel.write(narrow_sums);
    }
};

template <class T>
void backward(const NestedBlockBwdParams& p) {
    using A = Accumulate<T>;
    const auto pixel = NestedBlockBwdPixel<T>::plan(p);
    const NestedBlockFwdParams forward = pixel.again();
    const auto wide = NestedConvBwdRows<T>::plan(
        p.H, p.W, p.D, p.K, p.shortcut, {p.dconv_weight != nullptr, p.dconv_bias != nullptr, true});
    BackwardSlices<T> f{p,
                        pixel,
                        NestedBlockSlices<T>::plan(forward),
                        wide,
                        WeightSum<A>::plan(p.dfc1_weight, p.D, p.C),
                        WeightSum<A>::plan(p.dfc2_weight, p.C, p.D)};
    const CarvedScratch memory([&](Carver& carver) {
        f.take_parameters(carver);
        f.take_memory(carver);
    });
    Phases work;
    f.copy_parameters(work);
    f.run(work);
    f.write_gradients();
}

}  // namespace

void nested_block_backward_slices(const NestedBlockBwdParams& p) {
    with_type(p.dtype, [&](auto type) { backward<typename decltype(type)::type>(p); });
}

}  // namespace convnest::CONVNEST_ISA
