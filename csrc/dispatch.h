// The kernels of every instruction set that was compiled, and the choice among them at run time.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "dwconv_gelu_layernorm.h"
#include "gelu_layernorm.h"
#include "layernorm_residual.h"
#include "nested_block.h"
#include "nested_conv.h"

namespace convnest {

struct Kernels {
    const char* isa;
    void (*nested_conv_forward)(const NestedConvFwdParams&);
    void (*nested_conv_backward)(const NestedConvBwdParams&);
    void (*dwconv_gelu_layernorm_forward)(const DwconvGeluLayernormFwdParams&);
    void (*dwconv_gelu_layernorm_backward)(const DwconvGeluLayernormBwdParams&);
    void (*gelu_layernorm_forward)(const GeluLayernormFwdParams&);
    void (*gelu_layernorm_backward)(const GeluLayernormBwdParams&);
    void (*layernorm_residual_forward)(const LayernormResidualFwdParams&);
    void (*layernorm_residual_backward)(const LayernormResidualBwdParams&);
    // Packs the weights (C, D, K and dtype tell their sizes) into 64-byte aligned memory for
    // `packed` of a forward call on the same instruction set; returns the bytes of it. Null: count.
    std::int64_t (*nested_block_pack)(const NestedBlockFwdParams&, void* packed);
    void (*nested_block_forward)(const NestedBlockFwdParams&);
    void (*nested_block_backward)(const NestedBlockBwdParams&);
};

// The active set: the best one that this machine runs, unless set_isa chose another.
const Kernels& kernels();

std::vector<std::string> compiled_isas();
std::vector<std::string> runnable_isas();  // best last

// Throws std::invalid_argument, which lists what is possible.
void set_isa(const std::string& name);

}  // namespace convnest
