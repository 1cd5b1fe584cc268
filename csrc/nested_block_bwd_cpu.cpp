// nested_block backward, with xhat = (t - post_mean) post_rstd and f = dy post_weight:
//
//   dt = post_rstd (f - mean_c(f) - xhat mean_c(f xhat));   dv = dt W2;   du = dv GELU'(u)
//   dh from du as in nested_conv_bwd_rows.h;                 dx = scale dy + dh W1
//   dW2 = sum dt^T GELU(u);  db2 = sum dt;                   dW1 = sum dh^T x;  db1 = sum dh
//   dpost_weight = sum dy xhat;  dpost_bias = sum dy;        dscale = sum dy x
//
// A chunk is a run of bands, a band some rows of one image; its wide rows stay in scratch memory.
// Where h or u was not kept, a band first computes them again for its rows and the halo that du
// needs, by the code of forward, so that the gradients have the same bits whatever was kept.
// Parameter gradients go into one partial per chunk and are summed in order.
// Small maps have a pass of their own: nested_block_bwd_slices_cpu.cpp.
#include "common/call.h"
#include "nested_block_bwd_pixel.h"
#include "nested_block_bwd_slices.h"
#include "nested_conv_bwd_rows.h"

namespace convnest::CONVNEST_ISA {
namespace {

// The partial sums of the linear layers and of the last norm.
template <class T>
struct BlockPartials {
    using A = Accumulate<T>;
    static constexpr int kVectors = NestedBlockBwdPixel<T>::kVectors;

    A* data;
    std::int64_t chunks, C, D;

    // [C + 1][Dp]: dW1 transposed, and db1 as its last row; [C][Dp]: dW2; kVectors times [Cp].
    static std::int64_t size(std::int64_t C, std::int64_t D) {
        return (2 * C + 1) * padded_channels<A>(D) + kVectors * padded_channels<A>(C);
    }
    A* at(std::int64_t chunk) const { return data + chunk * size(C, D); }
    A* fc1(std::int64_t chunk) const { return at(chunk); }
    A* fc2(std::int64_t chunk) const { return at(chunk) + (C + 1) * padded_channels<A>(D); }
    A* vectors(std::int64_t chunk) const { return fc2(chunk) + C * padded_channels<A>(D); }
    void clear(std::int64_t chunk) const {
        for (std::int64_t i = 0; i < size(C, D); ++i) at(chunk)[i] = 0;
    }

    // All partials into the first one.
    Units sum_units() {
        const std::int64_t units = (size(C, D) + kUnit - 1) / kUnit;
        return {chunks > 1 ? units : 0, 0, nullptr, sum_unit, this};
    }

  private:
    static constexpr std::int64_t kUnit = 1 << 14;
    static void sum_unit(std::int64_t unit, char*, void* context) {
        const BlockPartials& p = *static_cast<const BlockPartials*>(context);
        const std::int64_t total = size(p.C, p.D);
        const std::int64_t end = (unit + 1) * kUnit < total ? (unit + 1) * kUnit : total;
        for (std::int64_t chunk = 1; chunk < p.chunks; ++chunk) {
            for (std::int64_t i = unit * kUnit; i < end; ++i) p.data[i] += p.at(chunk)[i];
        }
    }
};

template <class T>
struct Backward {
    using A = Accumulate<T>;
    using E = typename OperandOf<T>::type;
    using Packed = typename Operand<E>::Packed;
    static constexpr bool kOwnOperands = !std::is_same<A, E>::value;
    static constexpr std::int64_t kWriteUnits = 32;

    const NestedBlockBwdParams& p;
    NestedBlockRows<T> again;
    NestedConvBwdRows<T> wide;
    NestedBlockBwdPixel<T> pixel;
    std::int64_t bands, chunks, narrow;
    BlockPartials<T> partials;
    Packed *fc1_weight, *fc2_weight;  // of the input gradients
    A* no_bias;

    // One worker's memory.
    struct Scratch {
        typename NestedConvBwdRows<T>::Scratch wide;
        typename NestedBlockRows<T>::Scratch again;
        T *h, *u;  // [rows of a band and its halo][W][D], where they are computed again
        A* v;      // [S][W][Dp]: dv, then GELU(u)
        A* dt;     // [S][W][Cp]
        A* x;      // [S][W][C + 1], followed by a one
        A* dx;     // [S][W][Cp]
        E *dt_operand, *dh_operand;
        A* sums;               // kVectors times [Cp]: of the rows that entered together
        std::uint32_t* pairs;  // of the factors of the weight gradients
    };

    std::int64_t pixels() const { return wide.step.rows * p.W; }

    void take_parameters(Carver& carver) {
        wide.take_parameters(carver, chunks);
        if (p.u == nullptr) again.take_parameters(carver);
        partials.data = carver.take<A>(chunks * partials.size(p.C, p.D));
        fc1_weight = carver.take<Packed>(packed_elements<E>(p.D, p.C));
        fc2_weight = carver.take<Packed>(packed_elements<E>(p.C, p.D));
        no_bias = carver.take<A>(wide.step.channels);
        pixel.take_parameters(carver);
    }

    void copy_parameters(Phases& work) {
        wide.copy_parameters(p.norm_weight, p.norm_bias);
        if (p.u == nullptr) again.copy_parameters(work);
        copy_parameter(nullptr, A(0), p.D, no_bias);
        pixel.copy_parameters();
    }

    Scratch take_scratch(Carver& carver) const {
        Scratch s;
        s.wide = wide.take_scratch(carver);
        if (p.u == nullptr) s.again = again.take_scratch(carver);
        const std::int64_t longest = (p.H + bands - 1) / bands + p.K - 1;
        const std::int64_t kept = (longest < p.H ? longest : p.H) * p.W * p.D;
        s.h = carver.take<T>(p.h == nullptr ? kept : 0);
        s.u = carver.take<T>(p.u == nullptr ? kept : 0);
        s.v = carver.take<A>(pixels() * wide.step.pixel);
        s.dt = carver.take<A>(pixels() * narrow);
        s.x = carver.take<A>(pixels() * (p.C + 1));
        s.dx = carver.take<A>(pixels() * narrow);
        s.dt_operand = carver.take<E>(kOwnOperands ? pixels() * narrow : 0);
        s.dh_operand = carver.take<E>(kOwnOperands ? pixels() * wide.step.pixel : 0);
        s.sums = carver.take<A>(pixel.sums());
        s.pairs = carver.take<std::uint32_t>(
            kOwnOperands ? pair_elements(pixels(), p.C + 1, wide.step.channels) : 0);
        if constexpr (!kOwnOperands) {
            s.dt_operand = s.dt;
            s.dh_operand = s.wide.dg;
        }
        return s;
    }

    static void prepare(char* base, void* context) {
        const Backward& f = *static_cast<const Backward*>(context);
        Carver carver(base);
        const Scratch s = f.take_scratch(carver);
        f.wide.prepare(s.wide);
        if (f.p.u == nullptr) s.again.wide.z.clear_padding();
    }

    static void run_chunk(std::int64_t chunk, char* base, void* context) {
        const Backward& f = *static_cast<const Backward*>(context);
        Carver carver(base);
        const Scratch s = f.take_scratch(carver);
        f.wide.partials.clear(chunk);
        f.partials.clear(chunk);
        const Range units = part_of(f.p.N * f.bands, f.chunks, chunk);
        for (std::int64_t unit = units.begin; unit < units.end; ++unit) f.run_band(s, unit, chunk);
    }

    void run_band(const Scratch& s, std::int64_t unit, std::int64_t chunk) const {
        const auto& step = wide.step;
        const std::int64_t n = unit / bands;
        const Range band = part_of(p.H, bands, unit % bands);
        std::int64_t entered = step.first_row(band.begin);
        const Range halo{entered, step.end_row(band.end)};
        // h and u of the rows from `origin` on.
        const std::int64_t origin = (n * p.H + halo.begin) * p.W;
        if (p.u == nullptr) again.run_band(s.again, n, halo, {s.h, s.u, origin});
        const T* u = p.u == nullptr ? s.u : static_cast<const T*>(p.u) + origin * p.D;
        const T* h = p.h == nullptr ? s.h : static_cast<const T*>(p.h) + origin * p.D;
        for (std::int64_t y = band.begin, count; y < band.end; y += count) {
            count = step.count(y, band.end);
            while (entered < step.end_row(y + count)) {
                const std::int64_t left = step.end_row(y + count) - entered;
                const std::int64_t rows = left < step.rows ? left : step.rows;
                enter_rows(s, chunk, n, entered, rows, band,
                           u + (entered - halo.begin) * p.W * p.D);
                entered += rows;
            }
            const std::int64_t first = (n * p.H + y) * p.W;
            const A* rstd = static_cast<const A*>(p.rstd) + first;
            wide.run_rows(s.wide, chunk, y, count, h + (y - halo.begin) * p.W * p.D,
                          static_cast<const A*>(p.mean) + first, rstd);
            leave_rows(s, chunk, first, count * p.W, rstd);
        }
    }

    // dt, dv and du of `count` rows from y on; the sums of those that the band owns.
    void enter_rows(const Scratch& s, std::int64_t chunk, std::int64_t n, std::int64_t y,
                    std::int64_t count, Range band, const T* u) const {
        const std::int64_t first = (n * p.H + y) * p.W, stride = wide.step.pixel;
        const Range owned{band.begin > y ? band.begin - y : 0,
                          band.end < y + count ? band.end - y : count};
        for (std::int64_t i = 0; i < pixel.sums(); ++i) s.sums[i] = 0;
        for (std::int64_t i = 0; i < count * p.W; ++i) {
            const bool own = i >= owned.begin * p.W && i < owned.end * p.W;
            pixel.enter(first + i, s.dt + i * narrow, s.dt_operand + i * narrow,
                        own ? s.sums : nullptr);
        }
        A* sums = partials.vectors(chunk);
        for (std::int64_t i = 0; i < pixel.sums(); ++i) sums[i] += s.sums[i];
        linear_rows(LinearRows<E>{s.dt_operand, narrow, fc2_weight, no_bias, s.v, stride,
                                  count * p.W, p.C, p.D});
        for (std::int64_t r = 0; r < count; ++r) {
            A* v_row = s.v + r * p.W * stride;
            const T* u_row = u + r * p.W * p.D;
            wide.enter_row(s.wide, y + r, wide.step.first_row(band.begin),
                           [&](std::int64_t x, std::int64_t c, auto lanes) CONVNEST_INLINE_LAMBDA {
                               const auto g =
                                   gelu_and_grad_of<T>(load_as(u_row + x * p.D + c, lanes));
                               A* v = v_row + x * stride + c;
                               const auto du = load_all(v, lanes) * g.grad;
                               store_all(v, rounded_to<T>(g.value));
                               return du;
                           });
        }
        if (p.dfc2_weight == nullptr || owned.begin >= owned.end) return;
        outer_rows_of<T>(
            {s.dt + owned.begin * p.W * narrow, narrow, s.v + owned.begin * p.W * stride, stride,
             partials.fc2(chunk), wide.step.channels, (owned.end - owned.begin) * p.W, p.C,
             wide.step.channels},
            s.pairs);
    }

    void leave_rows(const Scratch& s, std::int64_t chunk, std::int64_t first, std::int64_t count,
                    const A* rstd) const {
        const bool fc1 = p.dfc1_weight != nullptr || p.dfc1_bias != nullptr;
        if (!fc1 && p.dx == nullptr) return;
        const std::int64_t stride = wide.step.pixel;
        wide.leave_dh(s.wide, rstd, count,
                      [&](std::int64_t i, std::int64_t c, const auto& value, auto lanes)
                          CONVNEST_INLINE_LAMBDA {
                              const auto dh = rounded_to<T>(zero_others(value, lanes));
                              store_all(s.wide.dg + i * stride + c, dh);
                              if constexpr (kOwnOperands)
                                  store_operand(s.dh_operand + i * stride + c, dh);
                          });
        if (fc1) {
            pixel.copy_x(first, count, s.x, p.C + 1);
            for (std::int64_t i = 0; i < count; ++i) s.x[i * (p.C + 1) + p.C] = 1;
            outer_rows_of<T>({s.x, p.C + 1, s.wide.dg, stride, partials.fc1(chunk),
                              wide.step.channels, count, p.C + 1, wide.step.channels},
                             s.pairs);
        }
        if (p.dx == nullptr) return;
        linear_rows(LinearRows<E>{s.dh_operand, stride, fc1_weight, no_bias, s.dx, narrow, count,
                                  p.D, p.C});
        for (std::int64_t i = 0; i < count; ++i) pixel.leave(first + i, s.dx + i * narrow);
    }

    // The summed partials to where they belong; of the weights, a part of the rows.
    static void write_part(std::int64_t unit, char*, void* context) {
        static_cast<const Backward*>(context)->write_weights(unit);
    }
    void write_weights(std::int64_t unit) const {
        const std::int64_t wide_stride = wide.step.channels;
        const A *fc1 = partials.fc1(0), *fc2 = partials.fc2(0);
        A *dfc1 = static_cast<A*>(p.dfc1_weight), *dfc2 = static_cast<A*>(p.dfc2_weight);
        const Range wide_rows = part_of(p.D, kWriteUnits, unit);
        for (std::int64_t d = wide_rows.begin; dfc1 != nullptr && d < wide_rows.end; ++d) {
            for (std::int64_t c = 0; c < p.C; ++c) dfc1[d * p.C + c] = fc1[c * wide_stride + d];
        }
        const Range rows = part_of(p.C, kWriteUnits, unit);
        for (std::int64_t c = rows.begin; dfc2 != nullptr && c < rows.end; ++c) {
            for (std::int64_t d = 0; d < p.D; ++d) dfc2[c * p.D + d] = fc2[c * wide_stride + d];
        }
    }
    void write_vectors() const {
        pixel.copy_to(p.dfc1_bias, partials.fc1(0) + p.C * wide.step.channels, p.D);
        pixel.write(partials.vectors(0));
    }
};

template <class T>
void backward(const NestedBlockBwdParams& p) {
    using A = Accumulate<T>;
    using E = typename OperandOf<T>::type;
    if (in_slices(p.H, p.W, p.D)) return nested_block_backward_slices(p);
    const auto pixel = NestedBlockBwdPixel<T>::plan(p);
    const NestedBlockFwdParams forward = pixel.again();
    const std::int64_t bands = backward_bands(p.N, p.H, p.K);
    const std::int64_t partial_bytes =
        Partials<A>::bytes(p.D, p.K * p.K) +
        BlockPartials<T>::size(p.C, p.D) * static_cast<std::int64_t>(sizeof(A));
    const std::int64_t chunks = chunk_count(p.N * bands, partial_bytes);
    Backward<T> f{
        p,
        NestedBlockRows<T>::plan(forward),
        NestedConvBwdRows<T>::plan(p.H, p.W, p.D, p.K, p.shortcut,
                                   {p.dconv_weight != nullptr, p.dconv_bias != nullptr, true}),
        pixel,
        bands,
        chunks,
        padded_channels<A>(p.C),
        {nullptr, chunks, p.C, p.D},
        {},
        {},
        {}};
    f.again.given_h = static_cast<const T*>(p.h);
    const CarvedScratch memory([&](Carver& carver) { f.take_parameters(carver); });
    const std::size_t scratch = bytes_of([&](Carver& carver) { f.take_scratch(carver); });
    Phases work;
    f.copy_parameters(work);
    auto conv = f.wide.weight_copy(p.conv_weight);
    PackLinear<E> fc1{static_cast<const A*>(p.fc1_weight), 1, p.C, f.fc1_weight, p.D, p.C};
    PackLinear<E> fc2{static_cast<const A*>(p.fc2_weight), 1, p.D, f.fc2_weight, p.C, p.D};
    auto sum = f.wide.partials.sum_into(p.dconv_weight, p.dconv_bias, p.dnorm_weight, p.dnorm_bias);
    for (const Units& units :
         {conv.units(), pack_units(fc1), pack_units(fc2),
          Units{chunks, scratch, f.prepare, f.run_chunk, &f}, sum.units(), f.partials.sum_units(),
          Units{f.kWriteUnits, 0, nullptr, f.write_part, &f}}) {
        work.add(units);
    }
    work.run();
    f.write_vectors();
}

}  // namespace

void nested_block_backward(const NestedBlockBwdParams& p) {
    with_type(p.dtype, [&](auto type) { backward<typename decltype(type)::type>(p); });
}

}  // namespace convnest::CONVNEST_ISA
