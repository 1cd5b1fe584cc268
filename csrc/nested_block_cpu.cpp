// nested_block forward; the formula is in nested_block.h.
//
// Reads x; writes y, and what is kept for backward. A unit is a band of rows of one image
// (nested_block_rows.h), after a phase of the rows about the bands' edges; nothing is computed
// twice but the norm of these. For small maps it is a slice of the channels of a few images
// (nested_block_slices.h).
#include "common/call.h"
#include "nested_block_rows.h"
#include "nested_block_slices.h"

namespace convnest::CONVNEST_ISA {
namespace {

template <class T>
struct Forward {
    using A = Accumulate<T>;

    NestedBlockRows<T> rows;
    std::int64_t bands, edges;  // of an image; no edges: none are shared
    A* edge_rows;               // [N][edges][K - 1][W][Dp]: g

    static Forward plan(const NestedBlockFwdParams& p) {
        const std::int64_t bands = forward_bands(p.N, p.H, p.K, num_threads());
        return {NestedBlockRows<T>::plan(p), bands, share_edges(p.H, bands, p.K) ? bands - 1 : 0,
                nullptr};
    }
    std::int64_t edge_units() const { return rows.p.N * edges * (rows.p.K - 1); }

    void take_memory(Carver& carver) {
        rows.take_parameters(carver);
        edge_rows = carver.take<A>(edge_units() * rows.edge_row());
    }
    typename NestedBlockRows<T>::Kept kept() const {
        return {static_cast<T*>(rows.p.h), static_cast<T*>(rows.p.u), 0};
    }
    // Between a band and the one below.
    const A* edge(std::int64_t n, std::int64_t band) const {
        if (band < 0 || band >= edges) return nullptr;
        return edge_rows + (n * edges + band) * (rows.p.K - 1) * rows.edge_row();
    }

    static void run_edge_row(std::int64_t unit, char* base, void* context) {
        const Forward& f = *static_cast<const Forward*>(context);
        const NestedBlockFwdParams& p = f.rows.p;
        Carver carver(base);
        const std::int64_t edge = unit / (p.K - 1);
        const Range above = part_of(p.H, f.bands, edge % f.edges);
        f.rows.make_edge_row(f.rows.take_scratch(carver), edge / f.edges,
                             above.end - p.K / 2 + unit % (p.K - 1), f.kept(),
                             f.edge_rows + unit * f.rows.edge_row());
    }

    static void prepare(char* base, void* context) {
        const Forward& f = *static_cast<const Forward*>(context);
        Carver carver(base);
        f.rows.take_scratch(carver).wide.z.clear_padding();
    }

    static void run_band(std::int64_t unit, char* base, void* context) {
        const Forward& f = *static_cast<const Forward*>(context);
        const NestedBlockFwdParams& p = f.rows.p;
        Carver carver(base);
        const std::int64_t n = unit / f.bands, band = unit % f.bands;
        f.rows.run_band(f.rows.take_scratch(carver), n, part_of(p.H, f.bands, band), f.kept(),
                        {f.edge(n, band - 1), f.edge(n, band)});
    }
};

template <class T>
void forward_slices(const NestedBlockFwdParams& p) {
    auto f = NestedBlockSlices<T>::plan(p);
    const CarvedScratch memory([&](Carver& carver) {
        f.rows.take_parameters(carver);
        f.take_memory(carver);
    });
    Phases work;
    f.rows.copy_parameters(work);
    f.run(work, static_cast<T*>(p.h), static_cast<T*>(p.u));
}

template <class T>
void forward(const NestedBlockFwdParams& p) {
    if (in_slices(p.H, p.W, p.D)) return forward_slices<T>(p);
    auto f = Forward<T>::plan(p);
    const CarvedScratch memory([&](Carver& carver) { f.take_memory(carver); });
    const std::size_t scratch = bytes_of([&](Carver& carver) { f.rows.take_scratch(carver); });
    Phases work;
    f.rows.copy_parameters(work);
    work.add({f.edge_units(), scratch, nullptr, f.run_edge_row, &f});
    work.add({p.N * f.bands, scratch, f.prepare, f.run_band, &f});
    work.run();
}

// The weights of `p` in `memory`; returns their bytes. With null memory it only counts.
template <class T>
std::int64_t pack(const NestedBlockFwdParams& p, char* memory) {
    auto rows = NestedBlockRows<T>::plan(p);
    Carver carver(memory);
    rows.take_weights(carver);
    if (memory != nullptr) {
        Phases work;
        rows.pack_weights(work);
        work.run();
    }
    return static_cast<std::int64_t>(carver.used());
}

}  // namespace

std::int64_t nested_block_pack(const NestedBlockFwdParams& p, void* packed) {
    char* memory = static_cast<char*>(packed);
    return with_type(p.dtype,
                     [&](auto type) { return pack<typename decltype(type)::type>(p, memory); });
}

void nested_block_forward(const NestedBlockFwdParams& p) {
    with_type(p.dtype, [&](auto type) { forward<typename decltype(type)::type>(p); });
}

}  // namespace convnest::CONVNEST_ISA
