// nested_conv, backward, in two wide kernels, on the tensor cores:
//
//     1  nested_conv_bwd_kernel     p, row sums; partials of dw, db, dγ, dβ
//                                                         reads dv, u, h; writes p (in dh)
//     2  nested_conv_finish_kernel  dh                    reads p, h; writes dh in place of p
//     3  sum_partials_kernel        each parameter's gradient, in a fixed order
//
// Seven passes over wide tensors, and the row sums, 8 bytes for 16 channels of a pixel: a quarter
// of a pass written and read. Instances: 1: 2 element types × kernel sizes 3, 5, 7 × 3
// schedules = 18; 2: 2.
#include "nested_conv_bwd_fused.h"

#include "common/conv_backward.cuh"
#include "nested_conv_bwd.cuh"
#include "nested_conv_finish.cuh"

namespace convnest::cuda {

namespace {

// One block of 512 threads fills an SM; it takes one item, of which there are enough to fill the
// largest GPU (148 SMs) a few times over and few enough to make its first and last steps cheap.
constexpr int kFusedBlocks = 512;

struct FusedPlan {
    Canvas canvas;
    Workspace workspace;
    std::size_t row_sums;
    ParameterPartials partials;

    FusedPlan(const NestedConvBwdParams& p, int kernel_size)
        : canvas(plan_canvas(p.N, p.H, p.W, kernel_size / 2,
                             ceil_div(kFusedBlocks, channel_blocks(p.C)))),
          row_sums(workspace.take(p.dh == nullptr ? 0
                                                  : sizeof(float2) * channel_blocks(p.C) *
                                                        static_cast<std::size_t>(p.N) * p.H * p.W)),
          partials(workspace, p.C, kernel_size, canvas.items, canvas.items) {}
};

// Both rings of a 9×9, 72 registers of accumulators, leave too few for the rest: sm_80 spills.
constexpr int kLargestFused = 7;

template <class Function>
void with_fused_size(int kernel_size, const Function& f) {
    with_band_size(kernel_size, [&](auto K) {
        if constexpr (K() <= kLargestFused) f(K);
    });
}

template <int K, Schedule kSchedule>
bool fits_shared(int shared_bytes) {
    return sizeof(NestedConvBwdShared<K, kSchedule>) <= static_cast<std::size_t>(shared_bytes);
}

// f(std::integral_constant<Schedule>) of the one with the most overlap that fits.
template <int K, class Function>
void with_schedule(int shared_bytes, const Function& f) {
    if (fits_shared<K, Schedule::overlapped>(shared_bytes)) {
        f(std::integral_constant<Schedule, Schedule::overlapped>{});
    } else if (fits_shared<K, Schedule::ahead>(shared_bytes)) {
        f(std::integral_constant<Schedule, Schedule::ahead>{});
    } else {
        f(std::integral_constant<Schedule, Schedule::direct>{});
    }
}

template <class Element, int K, Schedule kSchedule>
void launch(const NestedConvBwdParams& p, void* stream) {
    const FusedPlan plan(p, K);
    char* workspace = static_cast<char*>(p.workspace);
    const auto floats = [&](std::size_t offset) {
        return reinterpret_cast<float*>(workspace + offset);
    };
    auto* row_sums = reinterpret_cast<float2*>(workspace + plan.row_sums);
    const auto pixels = static_cast<std::uint32_t>(p.N * p.H) * p.W;
    const bool taps = p.dconv_weight != nullptr || p.dconv_bias != nullptr;
    const int blocks = channel_blocks(p.C);
    run({.kernel = "nested_conv_bwd_kernel",
         .grid = dim3(static_cast<unsigned>(plan.canvas.items) * blocks),
         .block = dim3(kPairThreads),
         .shared_bytes = sizeof(NestedConvBwdShared<K, kSchedule>),
         .stream = stream},
        nested_conv_bwd_kernel<Element, K, kSchedule>,
        NestedConvBwdArgs{.dv = static_cast<const std::uint16_t*>(p.dv),
                          .u = static_cast<const std::uint16_t*>(p.u),
                          .h = static_cast<const std::uint16_t*>(p.h),
                          .mean = p.mean,
                          .rstd = p.rstd,
                          .weight = p.conv_weight,
                          .ln_weight = p.ln_weight,
                          .ln_bias = p.ln_bias,
                          .p = static_cast<std::uint16_t*>(p.dh),
                          .row_sums = row_sums,
                          .dweight = taps ? floats(plan.partials.weight) : nullptr,
                          .dbias = floats(plan.partials.bias),
                          .dnorm = floats(plan.partials.norm),
                          .shortcut = p.shortcut,
                          .C = p.C,
                          .canvas = plan.canvas,
                          .bottom = bottom_images(plan.canvas),
                          .row_bytes = 2 * static_cast<std::uint32_t>(p.C),
                          .pixel_count = pixels,
                          .channel_blocks = blocks});
    if (p.dh != nullptr) {
        launch_nested_conv_finish<Element>({.p = static_cast<const std::uint16_t*>(p.dh),
                                            .h = static_cast<const std::uint16_t*>(p.h),
                                            .mean = p.mean,
                                            .rstd = p.rstd,
                                            .row_sums = row_sums,
                                            .dh = static_cast<std::uint16_t*>(p.dh),
                                            .pixels = pixels,
                                            .C = p.C,
                                            .channel_blocks = blocks,
                                            .rows = 0,
                                            .octet_reciprocal = 0},
                                           stream);
    }
    plan.partials.sum_up(p, stream);
}

}  // namespace

bool fuses_nested_conv_bwd(int kernel_size, int shared_bytes) {
    bool fits = false;
    with_fused_size(kernel_size,
                    [&](auto K) { fits = fits_shared<K(), Schedule::direct>(shared_bytes); });
    return fits;
}

std::size_t nested_conv_bwd_fused_workspace_bytes(const NestedConvBwdParams& params,
                                                  int kernel_size) {
    return FusedPlan(params, kernel_size).workspace.bytes;
}

void launch_nested_conv_bwd_fused(const NestedConvBwdParams& params, int kernel_size,
                                  ElementType type, void* stream) {
    with_fused_size(kernel_size, [&](auto K) {
        with_half(type, [&](auto element) {
            with_schedule<K()>(device_shared_bytes(), [&](auto schedule) {
                launch<decltype(element), K(), schedule()>(params, stream);
            });
        });
    });
}

}  // namespace convnest::cuda
