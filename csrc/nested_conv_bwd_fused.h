// nested_conv's backward in two wide kernels, 16-bit types on the tensor cores: when it runs, and
// its launch. Every tensor is 16-byte aligned and C a multiple of 8.
#pragma once

#include "nested_conv_cuda.h"

namespace convnest::cuda {

// Whether it runs where blocks can have `shared_bytes` of shared memory.
bool fuses_nested_conv_bwd(int kernel_size, int shared_bytes);

std::size_t nested_conv_bwd_fused_workspace_bytes(const NestedConvBwdParams& params,
                                                  int kernel_size);
void launch_nested_conv_bwd_fused(const NestedConvBwdParams& params, int kernel_size,
                                  ElementType type, void* stream);

}  // namespace convnest::cuda
