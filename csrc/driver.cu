#include "common/launch.cuh"
#include "driver_cuda.h"

namespace convnest::cuda {

#if defined(__CUDACC__)

int runtime_version() {
    int version = 0;
    return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

#else  // the host emulation has neither

int runtime_version() { return 0; }
int driver_version() { return 0; }

#endif

}  // namespace convnest::cuda
