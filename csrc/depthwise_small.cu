// The convolution of small maps: its instances, and which a launch takes. 2 element types × 2
// sources × (kernel sizes 3, 5, 7, 9, 11, 13, and 7×7 on maps of 7×7, the last stage of every model
// at 224²) = 28.
#include "common/depthwise_small.cuh"
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

template <class Element>
void launch(const char* name, MapSource source, const DepthwiseSmallArgs& args, int kernel_size,
            void* stream) {
    if (kernel_size == 7 && args.H == 7 && args.W == 7) {
        return launch<Element, 7, 7>(name, source, args, stream);
    }
    switch (kernel_size) {
        case 3: return launch<Element, 3, kMapSide>(name, source, args, stream);
        case 5: return launch<Element, 5, kMapSide>(name, source, args, stream);
        case 7: return launch<Element, 7, kMapSide>(name, source, args, stream);
        case 9: return launch<Element, 9, kMapSide>(name, source, args, stream);
        case 11: return launch<Element, 11, kMapSide>(name, source, args, stream);
        default: return launch<Element, 13, kMapSide>(name, source, args, stream);
    }
}

}  // namespace

void launch_depthwise_small(const char* name, MapSource source, DepthwiseSmallArgs args,
                            int kernel_size, ElementType type, void* stream) {
    args.channel_blocks = channel_blocks(args.C);
    type == ElementType::bfloat16 ? launch<BFloat16>(name, source, args, kernel_size, stream)
                                  : launch<Float16>(name, source, args, kernel_size, stream);
}

}  // namespace convnest::cuda
