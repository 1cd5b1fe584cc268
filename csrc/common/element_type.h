// The element types of the CUDA kernels' activations.
#pragma once

namespace convnest::cuda {

enum class ElementType { float32, bfloat16, float16 };

}  // namespace convnest::cuda
