// nested_conv on CUDA devices: which kernel, which tiles, and the launches. Instances of the
// forward kernel: 2 element types × kernel sizes 3, 5, 7, 9 × vector or scalar access = 16; of its
// statistics: 4.
#include <stdexcept>
#include <string>

#include "nested_conv.cuh"

namespace convnest::cuda {

namespace {

bool aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

// Blocks of 256 threads that fill the largest GPU (148 SMs, 2 blocks each) about six times over, so
// that a last, part-filled wave costs little.
constexpr int kWantedBlocks = 2048;

template <class Element, int K, bool kVector>
void launch_fwd(const NestedConvFwdParams& p, void* stream) {
    const auto pixels = static_cast<std::uint32_t>(p.N * p.H) * p.W;
    launch_row_statistics<Element, true, RowOutput::statistics, kVector>(
        "nested_conv_statistics",
        {.x = static_cast<const std::uint16_t*>(p.h),
         .mean = p.mean,
         .rstd = p.rstd,
         .rows = pixels,
         .C = p.C,
         .threads_per_row = 0,
         .eps = p.eps,
         .y = nullptr,
         .ln_weight = nullptr,
         .ln_bias = nullptr},
        stream);
    const int channel_blocks = ceil_div(p.C, kBlockChannels);
    const Canvas canvas =
        plan_canvas(p.N, p.H, p.W, K / 2, ceil_div(kWantedBlocks, channel_blocks));
    run({.kernel = "nested_conv_fwd_kernel",
         .grid = dim3(static_cast<unsigned>(canvas.items) * channel_blocks),
         .block = dim3(kThreads),
         .shared_bytes = sizeof(NestedConvFwdShared<K>),
         .stream = stream},
        nested_conv_fwd_kernel<Element, K, kVector>,
        NestedConvFwdArgs{p, canvas, pixels, channel_blocks});
}

template <class Element, int K>
void launch_fwd(const NestedConvFwdParams& p, void* stream) {
    if (p.C % 8 == 0 && aligned(p.h) && aligned(p.v) && aligned(p.u)) {
        launch_fwd<Element, K, true>(p, stream);
    } else {
        launch_fwd<Element, K, false>(p, stream);
    }
}

template <class Element>
void launch_fwd(const NestedConvFwdParams& p, int kernel_size, void* stream) {
    switch (kernel_size) {
        case 3: return launch_fwd<Element, 3>(p, stream);
        case 5: return launch_fwd<Element, 5>(p, stream);
        case 7: return launch_fwd<Element, 7>(p, stream);
        default: return launch_fwd<Element, 9>(p, stream);
    }
}

}  // namespace

bool nested_conv_has_kernel_size(int kernel_size) {
    return kernel_size == 3 || kernel_size == 5 || kernel_size == 7 || kernel_size == 9;
}

void check_nested_conv(int N, int H, int W, int C, int kernel_size) {
    const auto refuse = [](const std::string& what) {
        throw std::invalid_argument("nested_conv: " + what);
    };
    if (!nested_conv_has_kernel_size(kernel_size)) {
        refuse("kernel_size must be 3, 5, 7 or 9, got " + std::to_string(kernel_size));
    }
    // Pixels are counted in 32 bits, and a walk may step past the last image by a row of images.
    if (static_cast<std::int64_t>(N) * H * W >= std::int64_t{1} << 31) {
        refuse("N·H·W must be below 2^31, got " +
               std::to_string(static_cast<std::int64_t>(N) * H * W));
    }
    if (C > kMostChannels) {
        refuse("C must be at most " + std::to_string(kMostChannels) + ", got " + std::to_string(C));
    }
}

void launch_nested_conv_fwd(const NestedConvFwdParams& params, int kernel_size, ElementType type,
                            void* stream) {
    check_nested_conv(params.N, params.H, params.W, params.C, kernel_size);
    if (type == ElementType::bfloat16) {
        launch_fwd<BFloat16>(params, kernel_size, stream);
    } else {
        launch_fwd<Float16>(params, kernel_size, stream);
    }
}

}  // namespace convnest::cuda
