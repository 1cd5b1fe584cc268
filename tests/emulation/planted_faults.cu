// A small kernel with one planted fault at a time, to see that the emulation finds it:
//
//     D = A·B,  A [16, 16], B [16, 8] bf16, D [16, 8] float
//
// through shared memory (A as async copies), ldmatrix and mma; two warps, the second idle in the
// product. And the bare instructions on fragments, for the test of their layouts.
#include "common/memory.cuh"
#include "common/mma.cuh"
#include "guarded.h"

namespace convnest::cuda {

enum class Plant : int {
    nothing,
    missing_barrier,
    global_read_out_of_bounds,
    global_write_out_of_bounds,
    shared_read_out_of_bounds,
    shared_write_out_of_bounds,
    unwritten_shared_memory,
    divergent_barrier,
    early_exit,
    absent_lane,
    wrong_fragment_index,
    misaligned_matrix_row,
    missing_async_wait,
    missing_warp_barrier,
    two_writers,
    write_to_input,
    oversized_shared_memory,
};

struct ProductShared {
    std::uint16_t a[16][16];
    std::uint16_t bt[8][16];
    float d[16][8];
};

__global__ void planted_kernel(Plant plant, const std::uint16_t* a, const std::uint16_t* b,
                               float* d) {
    CONVNEST_SHARED_MEMORY(ProductShared, shared);
    const int thread = threadIdx.x, lane = thread % 32, g = lane >> 2, t = lane & 3;
    if (thread < 32) {
        async_copy16(&shared.a[0][0] + lane * 8, a + lane * 8);
        async_copy_commit();
    } else {
        const int past = plant == Plant::global_read_out_of_bounds ? 1 : 0;
        const int rows = plant == Plant::unwritten_shared_memory ? 7 : 8;
        for (int i = lane; i < rows * 16; i += 32) {
            store_shared(&shared.bt[i / 16][i % 16], load_global(b + i % 16 * 8 + i / 16 + past));
        }
        if (plant == Plant::shared_write_out_of_bounds && lane == 0) {
            store_shared(&shared.d[0][0] + 16 * 8, 1.f);
        }
        if (plant == Plant::early_exit) return;
    }
    if (plant != Plant::missing_async_wait) async_copy_wait<0>();
    if (plant == Plant::divergent_barrier && thread < 32) {
        __syncthreads();
    } else if (plant != Plant::missing_barrier) {
        __syncthreads();
    }
    if (thread >= 32) return;
    FragmentA fragment_a;
    FragmentB fragment_b;
    FragmentC fragment_d, zero = {0.f, 0.f, 0.f, 0.f};
    const int step = plant == Plant::misaligned_matrix_row ? 2 : 0;
    load_matrices<false>(fragment_a, &shared.a[lane % 16][lane / 16 * 8] + step);
    const int row = plant == Plant::wrong_fragment_index ? 2 * t : g;
    for (int i = 0; i < 2; ++i) {
        fragment_b[i] = load_shared<std::uint32_t>(&shared.bt[row][2 * t + 8 * i]);
    }
    if (plant == Plant::absent_lane && lane == 31) return;
    mma<BFloat16>(fragment_d, fragment_a, fragment_b, zero);
    for (int i = 0; i < 4; ++i) {
        store_shared(&shared.d[g + i / 2 * 8][2 * t + i % 2], fragment_d[i]);
    }
    if (plant != Plant::missing_warp_barrier) __syncwarp();
    const int above = plant == Plant::shared_read_out_of_bounds && lane == 31 ? 1 : 0;
    float* out = d + lane * 4;
    if (plant == Plant::two_writers && lane == 1) out = d;
    if (plant == Plant::global_write_out_of_bounds && lane == 31) out += 4;
    store_global(reinterpret_cast<float4*>(out),
                 load_shared<float4>(&shared.d[0][0] + lane * 4 + 4 * above));
    if (plant == Plant::write_to_input && lane == 0) {
        store_global(const_cast<std::uint16_t*>(a), std::uint16_t{0});
    }
}

// d[lane] = mma(a[lane], b[lane]) with c = 0, on raw fragments.
template <class Element>
__global__ void fragment_kernel(const std::uint32_t* a, const std::uint32_t* b, float* d) {
    const int lane = threadIdx.x;
    FragmentA fragment_a;
    FragmentB fragment_b;
    FragmentC fragment_d, zero = {0.f, 0.f, 0.f, 0.f};
    for (int i = 0; i < 4; ++i) fragment_a[i] = load_global(a + lane * 4 + i);
    for (int i = 0; i < 2; ++i) fragment_b[i] = load_global(b + lane * 2 + i);
    mma<Element>(fragment_d, fragment_a, fragment_b, zero);
    for (int i = 0; i < 4; ++i) store_global(d + lane * 4 + i, fragment_d[i]);
}

struct MatricesShared {
    std::uint16_t rows[32][8];
};

// Four 8×8 matrices, row by row, as ldmatrix hands them out.
template <bool kTransposed>
__global__ void matrices_kernel(const std::uint16_t* matrices, std::uint32_t* fragments) {
    CONVNEST_SHARED_MEMORY(MatricesShared, shared);
    const int lane = threadIdx.x;
    for (int i = 0; i < 8; ++i) {
        store_shared(&shared.rows[lane][i], load_global(matrices + lane * 8 + i));
    }
    __syncthreads();
    std::uint32_t fragment[4];
    load_matrices<kTransposed>(fragment, &shared.rows[lane][0]);
    for (int i = 0; i < 4; ++i) store_global(fragments + lane * 4 + i, fragment[i]);
}

}  // namespace convnest::cuda

extern "C" {

int planted_product(int plant, const std::uint16_t* a, const std::uint16_t* b, float* d) {
    return emulation::guarded([&] {
        using namespace convnest::cuda;
        const auto which = static_cast<Plant>(plant);
        const std::size_t missing = which == Plant::oversized_shared_memory ? 4 : 0;
        run({"planted_kernel", dim3(1), dim3(64), sizeof(ProductShared) - missing, nullptr},
            planted_kernel, which, a, b, d);
    });
}

int fragment_product(int float16, const std::uint32_t* a, const std::uint32_t* b, float* d) {
    return emulation::guarded([&] {
        using namespace convnest::cuda;
        run({"fragment_kernel", dim3(1), dim3(32), 0, nullptr},
            float16 ? fragment_kernel<Float16> : fragment_kernel<BFloat16>, a, b, d);
    });
}

int fragment_matrices(int transposed, const std::uint16_t* matrices, std::uint32_t* fragments) {
    return emulation::guarded([&] {
        using namespace convnest::cuda;
        run({"matrices_kernel", dim3(1), dim3(32), sizeof(MatricesShared), nullptr},
            transposed ? matrices_kernel<true> : matrices_kernel<false>, matrices, fragments);
    });
}

}  // extern "C"
