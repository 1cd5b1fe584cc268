// Both gradients of the convolution of small maps: instances, and which a launch takes. 2 element
// types × 2 sources × (kernel sizes 3, 5, 7, 9, 11, 13, and 7×7 on maps of 7×7) = 28.
#include "common/depthwise_small_bwd.cuh"
#include "common/instances.cuh"
#include "common/map_size.cuh"
#include "common/plan.cuh"

namespace convnest::cuda {

namespace {

template <class Element, int K, int kSide>
void launch(const char* name, MapSource source, const DepthwiseSmallBwdArgs& args, void* stream) {
    const Launch where{.kernel = name,
                       .grid = dim3(static_cast<unsigned>(args.groups) * args.channel_blocks),
                       .block = dim3(kThreads),
                       .shared_bytes = sizeof(DepthwiseSmallBwdShared<K>),
                       .stream = stream};
    source == MapSource::tensor
        ? run(where, depthwise_small_bwd_kernel<Element, K, kSide, MapSource::tensor>, args)
        : run(where, depthwise_small_bwd_kernel<Element, K, kSide, MapSource::gelu_norm>, args);
}

}  // namespace

// One tile to a block until the blocks fill the largest GPU several times; partial sums of a tile
// are worth 5% of its bytes at 7×7, and fewer from there on.
int small_map_groups(int N, int C) {
    const int tiles = ceil_div(N, kMapImages), wanted = ceil_div(kWantedBlocks, channel_blocks(C));
    return tiles < wanted ? tiles : wanted;
}

void launch_depthwise_small_bwd(const char* name, MapSource source, DepthwiseSmallBwdArgs args,
                                int kernel_size, ElementType type, void* stream) {
    args.channel_blocks = channel_blocks(args.C);
    with_half(type, [&](auto element) {
        with_map_size(kernel_size, args.H, args.W, [&](auto K, auto side) {
            launch<decltype(element), K(), side()>(name, source, args, stream);
        });
    });
}

}  // namespace convnest::cuda
