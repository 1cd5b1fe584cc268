// nested_block forward; the formula is in nested_block.h.
//
// Reads x; writes y, and what is kept for backward. A unit is a band of rows of one image
// (nested_block_rows.h), and nothing is computed twice but the halo rows of neighbouring bands; or,
// for small maps, a slice of the channels of a few images (nested_block_slices.h).
#include "common/call.h"
#include "nested_block_rows.h"
#include "nested_block_slices.h"

namespace convnest::CONVNEST_ISA {
namespace {

template <class T>
struct Forward {
    NestedBlockRows<T> rows;
    std::int64_t bands;

    static void prepare(char* base, void* context) {
        const Forward& f = *static_cast<const Forward*>(context);
        Carver carver(base);
        f.rows.take_scratch(carver).wide.z.clear_padding();
    }

    static void run_unit(std::int64_t unit, char* base, void* context) {
        const Forward& f = *static_cast<const Forward*>(context);
        const NestedBlockFwdParams& p = f.rows.p;
        Carver carver(base);
        f.rows.run_band(f.rows.take_scratch(carver), unit / f.bands,
                        part_of(p.H, f.bands, unit % f.bands),
                        {static_cast<T*>(p.h), static_cast<T*>(p.u), 0});
    }
};

template <class T>
void forward_slices(const NestedBlockFwdParams& p) {
    auto f = NestedBlockSlices<T>::plan(p);
    Carver count(nullptr);
    f.rows.take_parameters(count);
    f.take_memory(count);
    const CallScratch memory(count.used());
    Carver carver(memory.data());
    f.rows.take_parameters(carver);
    f.take_memory(carver);
    Phases work;
    f.rows.copy_parameters(work);
    f.run(work, static_cast<T*>(p.h), static_cast<T*>(p.u));
}

template <class T>
void forward(const NestedBlockFwdParams& p) {
    if (in_slices(p.H, p.W, p.D)) return forward_slices<T>(p);
    Forward<T> f{NestedBlockRows<T>::plan(p), forward_bands(p.N, p.H, p.K, num_threads())};
    Carver parameters(nullptr), scratch(nullptr);
    f.rows.take_parameters(parameters);
    f.rows.take_scratch(scratch);
    const CallScratch memory(parameters.used());
    Carver carver(memory.data());
    f.rows.take_parameters(carver);
    Phases work;
    f.rows.copy_parameters(work);
    work.add({p.N * f.bands, scratch.used(), f.prepare, f.run_unit, &f});
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
