// The element types of the CUDA kernels' activations.
#pragma once

namespace convnest::cuda {

enum class ElementType { bfloat16, float16, float32 };

}  // namespace convnest::cuda
