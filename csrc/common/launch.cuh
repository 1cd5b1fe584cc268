// The one door between the CUDA kernels and what runs them: nvcc and a GPU, or a C++ compiler and
// the host emulation of the programming model (tests/emulation), which proves them without a GPU.
// Kernel headers include this and the other .cuh files of this folder, and nothing else of CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// The kernel's whole shared memory: one struct, carved from the launch's dynamic bytes.
#define CONVNEST_SHARED_MEMORY(Struct, name)                               \
    extern __shared__ __align__(16) unsigned char convnest_shared_bytes[]; \
    Struct& name = *reinterpret_cast<Struct*>(convnest_shared_bytes)

#else

#include "cuda_model.h"

#endif

namespace convnest::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// What a launch needs beside the kernel's arguments. `kernel` names it in error messages.
struct Launch {
    const char* kernel;
    dim3 grid;
    dim3 block;
    std::size_t shared_bytes;
    void* stream;
};

#if defined(__CUDACC__)

inline void check(cudaError_t error, const Launch& launch, const char* step) {
    if (error == cudaSuccess) return;
    (void)cudaGetLastError();  // a launch error is not sticky: the next launch may succeed
    const auto extent = [](dim3 d) {
        return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) +
               ")";
    };
    throw std::runtime_error(std::string(launch.kernel) + ": " + step + " failed with grid " +
                             extent(launch.grid) + ", block " + extent(launch.block) + " and " +
                             std::to_string(launch.shared_bytes) +
                             " bytes of shared memory: " + cudaGetErrorString(error));
}

// Launches on the caller's stream and current device. Allocates nothing and waits for nothing, so
// that it can be captured into a CUDA graph. Throws std::runtime_error.
template <class... Parameters, class... Arguments>
void run(const Launch& launch, void (*kernel)(Parameters...), const Arguments&... arguments) {
    constexpr std::size_t kWithoutOptIn = 48 * 1024;
    if (launch.shared_bytes > kWithoutOptIn) {
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(launch.shared_bytes)),
              launch, "asking for shared memory");
    }
    cudaLaunchConfig_t config{};
    config.gridDim = launch.grid;
    config.blockDim = launch.block;
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = static_cast<cudaStream_t>(launch.stream);
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), launch,
          "launch");
}

// Bytes of shared memory that a block can have on the current device.
inline int device_shared_bytes() {
    int device = 0, bytes = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error == cudaSuccess) return bytes;
    (void)cudaGetLastError();
    throw std::runtime_error(std::string("asking for the device's shared memory failed: ") +
                             cudaGetErrorString(error));
}

#else

inline int device_shared_bytes() { return emulation::device_shared_bytes; }

template <class... Parameters, class... Arguments>
void run(const Launch& launch, void (*kernel)(Parameters...), const Arguments&... arguments) {
    emulation::run_grid(launch.kernel, launch.grid, launch.block, launch.shared_bytes,
                        [&] { kernel(static_cast<Parameters>(arguments)...); });
}

#endif

}  // namespace convnest::cuda
