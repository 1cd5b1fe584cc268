// The kernels under the host emulation, as a C library for ctypes. Every function returns 0, or 1
// with the reason in emulation_error(). Buffers that kernels may touch are declared beforehand.
#include "common/depthwise.cuh"
#include "common/depthwise_small.cuh"
#include "common/depthwise_small_bwd.cuh"
#include "common/depthwise_wgrad.cuh"
#include "dwconv_gelu_layernorm_cuda.h"
#include "gelu_layernorm_cuda.h"
#include "guarded.h"
#include "nested_conv.cuh"
#include "nested_conv_bwd.cuh"
#include "nested_conv_bwd_fused.h"

namespace {

using convnest::cuda::ElementType;

// In the order of emulation.TYPES.
ElementType element_type(int type) { return static_cast<ElementType>(type); }

template <class Element>
void gelu_of_bits(const std::uint16_t* x, int count, float* gelu, float* slope, float* both) {
    for (int i = 0; i < count; ++i) {
        gelu[i] = convnest::cuda::gelu_of<Element>(Element::widen_one(x[i]));
        slope[i] = convnest::cuda::gelu_slope_of<Element>(Element::widen_one(x[i]));
        const auto found = convnest::cuda::gelu_and_slope<Element>(Element::widen_one(x[i]));
        both[i] = found.value, both[count + i] = found.slope;
    }
}

}  // namespace

extern "C" {

const char* emulation_error() { return emulation::error.c_str(); }

void emulation_configure(unsigned seed, int skipped_barrier, int check_races) {
    emulation::machine.settings = {seed, skipped_barrier, check_races != 0};
    emulation::machine.barrier_sites.clear();
    emulation::buffers.clear();
}

// Of the device: 0 for the most that there is.
void emulation_device_shared_bytes(int bytes) {
    emulation::device_shared_bytes = bytes > 0 ? bytes : emulation::kMaxSharedBytes;
}

int nested_conv_bwd_fuses(int kernel_size, int shared_bytes) {
    return convnest::cuda::fuses_nested_conv_bwd(kernel_size, shared_bytes);
}

// Of the forward, the input gradient, the weight gradient, and the two in one, from the schedule
// with the most overlap to that with none; of small maps, forward and backward.
int shared_bytes_of_7x7(int kernel) {
    using namespace convnest::cuda;
    const std::size_t bytes[] = {sizeof(NestedConvFwdShared<7>),
                                 sizeof(DepthwiseShared<7, Source::gelu_gradient>),
                                 sizeof(DepthwiseWgradShared<7, false>),
                                 sizeof(NestedConvBwdShared<7, Schedule::overlapped>),
                                 sizeof(NestedConvBwdShared<7, Schedule::ahead>),
                                 sizeof(NestedConvBwdShared<7, Schedule::direct>),
                                 sizeof(DepthwiseSmallShared<7>),
                                 sizeof(DepthwiseSmallBwdShared<7>)};
    return static_cast<int>(bytes[kernel]);
}

int takes_small_map(int N, int H, int W, int kernel_size) {
    return convnest::cuda::takes_small_map(N, H, W, kernel_size);
}

int small_map_groups(int N, int C) { return convnest::cuda::small_map_groups(N, C); }

// GELU and its derivative of 16-bit numbers, before they are rounded to that type.
void gelu(const std::uint16_t* x, int count, int type, float* gelu, float* slope, float* both) {
    const bool bf16 = element_type(type) == ElementType::bfloat16;
    (bf16 ? gelu_of_bits<convnest::cuda::BFloat16>
          : gelu_of_bits<convnest::cuda::Float16>)(x, count, gelu, slope, both);
}

// Outputs as a fraction of the pixels that the items march over, 128 to a row, in stages.
double canvas_efficiency(int images, int height, int width, int radius, int wanted_items,
                         int halo_rows) {
    using namespace convnest::cuda;
    const Canvas canvas = plan_canvas(images, height, width, radius, wanted_items);
    std::int64_t rows = 0;
    for (int i = 0; i < canvas.items; ++i) {
        const Item item = item_of(canvas, i);
        const int start = halo_rows > 0 ? item.first - radius : item.start;
        rows += ceil_div(item.end + radius - start, kStageRows) * kStageRows;
    }
    return static_cast<double>(images) * height * width / (128.0 * static_cast<double>(rows));
}

// The same of nested_conv_bwd_kernel at 7×7, in whole stages.
double fused_efficiency(int images, int height, int width, int wanted_items) {
    using namespace convnest::cuda;
    const Canvas canvas = plan_canvas(images, height, width, 3, wanted_items);
    std::int64_t stages = 0;
    for (int i = 0; i < canvas.items; ++i) {
        const Item item = item_of(canvas, i);
        stages += warm_up_stages<7>(item) + ceil_div(item.end - item.first, kStageRows);
    }
    return static_cast<double>(images) * height * width /
           (128.0 * kStageRows * static_cast<double>(stages));
}

int emulation_barrier_sites() { return static_cast<int>(emulation::machine.barrier_sites.size()); }

void emulation_declare(const char* name, const void* address, std::size_t bytes, int writable) {
    emulation::declare_buffer(name, address, bytes, writable != 0);
}

std::size_t nested_conv_fwd_params_bytes() { return sizeof(convnest::cuda::NestedConvFwdParams); }

int nested_conv_fwd(const convnest::cuda::NestedConvFwdParams* params, int kernel_size, int type) {
    return emulation::guarded([&] {
        convnest::cuda::launch_nested_conv_fwd(*params, kernel_size, element_type(type), nullptr);
    });
}

std::size_t nested_conv_bwd_params_bytes() { return sizeof(convnest::cuda::NestedConvBwdParams); }

std::size_t nested_conv_bwd_workspace(const convnest::cuda::NestedConvBwdParams* params,
                                      int kernel_size, int type) {
    return convnest::cuda::nested_conv_bwd_workspace_bytes(*params, kernel_size,
                                                           element_type(type));
}

int nested_conv_bwd(const convnest::cuda::NestedConvBwdParams* params, int kernel_size, int type) {
    return emulation::guarded([&] {
        convnest::cuda::launch_nested_conv_bwd(*params, kernel_size, element_type(type), nullptr);
    });
}

std::size_t dwconv_gelu_layernorm_fwd_params_bytes() {
    return sizeof(convnest::cuda::DwconvGeluLayerNormFwdParams);
}

int dwconv_gelu_layernorm_fwd(const convnest::cuda::DwconvGeluLayerNormFwdParams* params,
                              int kernel_size, int type) {
    return emulation::guarded([&] {
        convnest::cuda::launch_dwconv_gelu_layernorm_fwd(*params, kernel_size, element_type(type),
                                                         nullptr);
    });
}

std::size_t dwconv_gelu_layernorm_bwd_params_bytes() {
    return sizeof(convnest::cuda::DwconvGeluLayerNormBwdParams);
}

std::size_t dwconv_gelu_layernorm_bwd_workspace(int N, int H, int W, int C, int kernel_size,
                                                int type) {
    return convnest::cuda::dwconv_gelu_layernorm_bwd_workspace_bytes(N, H, W, C, kernel_size,
                                                                     element_type(type));
}

int dwconv_gelu_layernorm_bwd(const convnest::cuda::DwconvGeluLayerNormBwdParams* params,
                              int kernel_size, int type) {
    return emulation::guarded([&] {
        convnest::cuda::launch_dwconv_gelu_layernorm_bwd(*params, kernel_size, element_type(type),
                                                         nullptr);
    });
}

std::size_t gelu_layernorm_fwd_params_bytes() {
    return sizeof(convnest::cuda::GeluLayerNormFwdParams);
}

std::size_t gelu_layernorm_bwd_params_bytes() {
    return sizeof(convnest::cuda::GeluLayerNormBwdParams);
}

std::size_t gelu_layernorm_bwd_workspace(int rows, int C) {
    return convnest::cuda::gelu_layernorm_bwd_workspace_bytes(rows, C);
}

int gelu_layernorm_fwd(const convnest::cuda::GeluLayerNormFwdParams* params, int type) {
    return emulation::guarded(
        [&] { convnest::cuda::launch_gelu_layernorm_fwd(*params, element_type(type), nullptr); });
}

int gelu_layernorm_bwd(const convnest::cuda::GeluLayerNormBwdParams* params, int type) {
    return emulation::guarded(
        [&] { convnest::cuda::launch_gelu_layernorm_bwd(*params, element_type(type), nullptr); });
}

}  // extern "C"
