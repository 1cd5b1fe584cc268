// The convolution of small maps: its instances, and which a launch takes. 2 element types × 2
// sources × (kernel sizes 3, 5, 7, 9, 11, 13, and 7×7 on maps of 7×7, the last stage of every model
// at 224²) = 28.
#include "common/depthwise_small.cuh"
#include "common/instances.cuh"
#include "common/map_size.cuh"
#include "common/plan.cuh"

namespace convnest::cuda {

namespace {

template <class Element, int K, int kSide>
void launch(const char* name, MapSource source, const DepthwiseSmallArgs& args, void* stream) {
    const Launch where{
        .kernel = name,
        .grid = dim3(static_cast<unsigned>(ceil_div(args.N, kMapImages)) * args.channel_blocks),
        .block = dim3(kThreads),
        .shared_bytes = sizeof(DepthwiseSmallShared<K>),
        .stream = stream};
    source == MapSource::tensor
        ? run(where, depthwise_small_kernel<Element, K, kSide, MapSource::tensor>, args)
        : run(where, depthwise_small_kernel<Element, K, kSide, MapSource::gelu_norm>, args);
}

}  // namespace

void launch_depthwise_small(const char* name, MapSource source, DepthwiseSmallArgs args,
                            int kernel_size, ElementType type, void* stream) {
    args.channel_blocks = channel_blocks(args.C);
    with_half(type, [&](auto element) {
        with_map_size(kernel_size, args.H, args.W, [&](auto K, auto side) {
            launch<decltype(element), K(), side()>(name, source, args, stream);
        });
    });
}

}  // namespace convnest::cuda
