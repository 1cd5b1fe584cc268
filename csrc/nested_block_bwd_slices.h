// nested_block backward on small maps (in_slices); see nested_block_bwd_slices_cpu.cpp.
#pragma once

#include "nested_block.h"

namespace convnest::CONVNEST_ISA {

void nested_block_backward_slices(const NestedBlockBwdParams&);

}  // namespace convnest::CONVNEST_ISA
