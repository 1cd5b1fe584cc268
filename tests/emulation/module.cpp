// The bindings of the real build over the emulated kernels, as a Python module.
#include "bindings_cuda.h"

PYBIND11_MODULE(emulated, m) {
    m.doc() = "The CUDA kernels on the host emulation; see csrc/bindings_cuda.cpp.";
    convnest::cuda::bind(m);
}
