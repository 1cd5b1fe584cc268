// The convolutions on the FMA units: their instances, and which a launch takes. Float32 with kernel
// sizes 3 to 13, the 16-bit types with 11 and 13: 6 + 2 × 2 = 10 instances of each kernel.
#include "common/depthwise_fma_wgrad.cuh"
#include "common/instances.cuh"

namespace convnest::cuda {

namespace {

// Calls f.operator()<Element, K>() for the instance of this type and kernel size.
template <class F>
void with_instance(int kernel_size, ElementType type, const F& f) {
    if (type == ElementType::float32) {
        switch (kernel_size) {
            case 3: return f.template operator()<Float32, 3>();
            case 5: return f.template operator()<Float32, 5>();
            case 7: return f.template operator()<Float32, 7>();
            case 9: return f.template operator()<Float32, 9>();
            case 11: return f.template operator()<Float32, 11>();
            default: return f.template operator()<Float32, 13>();
        }
    }
    with_half(type, [&](auto element) {
        using Element = decltype(element);
        kernel_size == 11 ? f.template operator()<Element, 11>()
                          : f.template operator()<Element, 13>();
    });
}

}  // namespace

void launch_depthwise_fma(const char* name, DepthwiseFmaArgs args, int N, int H, int W,
                          int kernel_size, ElementType type, void* stream) {
    args.channel_blocks = ceil_div(args.C, kFmaChannels);
    const int wanted = ceil_div(kWantedBlocks, args.channel_blocks);
    args.tiles = plan_fma_tiles(N, H, W, kFmaWarps, wanted);
    args.groups = args.tiles.items < wanted ? args.tiles.items : wanted;
    with_instance(kernel_size, type, [&]<class Element, int K>() {
        run({.kernel = name,
             .grid = dim3(static_cast<unsigned>(args.groups) * args.channel_blocks),
             .block = dim3(args.tiles.strips() * kWarpSize),
             .shared_bytes = sizeof(DepthwiseFmaShared<K>),
             .stream = stream},
            depthwise_fma_kernel<Element, K>, args);
    });
}

void launch_depthwise_fma_wgrad(const char* name, DepthwiseFmaWgradArgs args,
                                const FmaWgradPlan& plan, int kernel_size, ElementType type,
                                void* stream) {
    args.channel_blocks = ceil_div(args.C, kFmaChannels);
    args.tiles = plan.tiles;
    args.groups = plan.groups;
    with_instance(kernel_size, type, [&]<class Element, int K>() {
        run({.kernel = name,
             .grid = dim3(static_cast<unsigned>(args.groups) * args.channel_blocks),
             .block = dim3(args.tiles.strips() * kTapShares<K> * kWarpSize),
             .shared_bytes = sizeof(DepthwiseFmaWgradShared<K>),
             .stream = stream},
            depthwise_fma_wgrad_kernel<Element, K>, args);
    });
}

}  // namespace convnest::cuda
