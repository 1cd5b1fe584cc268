#include "dispatch.h"

#include <stdexcept>

// Defined by the <stem>_cpu.cpp of each instruction set.
#define CONVNEST_DECLARE_ISA(isa)                                             \
    namespace convnest::isa {                                                 \
    void nested_conv_forward(const NestedConvFwdParams&);                     \
    void nested_conv_backward(const NestedConvBwdParams&);                    \
    void dwconv_gelu_layernorm_forward(const DwconvGeluLayernormFwdParams&);  \
    void dwconv_gelu_layernorm_backward(const DwconvGeluLayernormBwdParams&); \
    void gelu_layernorm_forward(const GeluLayernormFwdParams&);               \
    void gelu_layernorm_backward(const GeluLayernormBwdParams&);              \
    void layernorm_residual_forward(const LayernormResidualFwdParams&);       \
    void layernorm_residual_backward(const LayernormResidualBwdParams&);      \
    std::int64_t nested_block_pack(const NestedBlockFwdParams&, void*);       \
    void nested_block_forward(const NestedBlockFwdParams&);                   \
    void nested_block_backward(const NestedBlockBwdParams&);                  \
    constexpr Kernels kKernels{#isa,                                          \
                               nested_conv_forward,                           \
                               nested_conv_backward,                          \
                               dwconv_gelu_layernorm_forward,                 \
                               dwconv_gelu_layernorm_backward,                \
                               gelu_layernorm_forward,                        \
                               gelu_layernorm_backward,                       \
                               layernorm_residual_forward,                    \
                               layernorm_residual_backward,                   \
                               nested_block_pack,                             \
                               nested_block_forward,                          \
                               nested_block_backward};                        \
    }

CONVNEST_DECLARE_ISA(portable)
#if defined(CONVNEST_X86_64)
CONVNEST_DECLARE_ISA(avx2)
CONVNEST_DECLARE_ISA(avx512)
CONVNEST_DECLARE_ISA(avx512bf16)
#endif

namespace convnest {
namespace {

struct Choice {
    const Kernels* kernels;
    bool runs_here;
};

// Worst first. The builtin asks the operating system, too, whether it saves the wide registers.
const std::vector<Choice>& choices() {
    static const std::vector<Choice> all = [] {
        std::vector<Choice> found{{&portable::kKernels, true}};
#if defined(CONVNEST_X86_64)
        __builtin_cpu_init();
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
        const bool avx512 =
            avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        found.push_back({&avx2::kKernels, avx2});
        found.push_back({&avx512::kKernels, avx512});
        found.push_back({&avx512bf16::kKernels, avx512 && __builtin_cpu_supports("avx512bf16")});
#endif
        return found;
    }();
    return all;
}

const Kernels* best() {
    const Kernels* found = nullptr;
    for (const Choice& choice : choices()) {
        if (choice.runs_here) found = choice.kernels;
    }
    return found;
}

std::atomic<const Kernels*> active{nullptr};

std::vector<std::string> isas(bool only_runnable) {
    std::vector<std::string> names;
    for (const Choice& choice : choices()) {
        if (choice.runs_here || !only_runnable) names.emplace_back(choice.kernels->isa);
    }
    return names;
}

}  // namespace

const Kernels& kernels() {
    const Kernels* chosen = active.load(std::memory_order_acquire);
    if (chosen == nullptr) active = chosen = best();
    return *chosen;
}

std::vector<std::string> compiled_isas() { return isas(false); }
std::vector<std::string> runnable_isas() { return isas(true); }

void set_isa(const std::string& name) {
    std::string possible;
    for (const Choice& choice : choices()) {
        if (!choice.runs_here) continue;
        if (choice.kernels->isa == name) {
            active = choice.kernels;
            return;
        }
        possible += (possible.empty() ? "" : ", ") + std::string(choice.kernels->isa);
    }
    throw std::invalid_argument("isa must be one of " + possible + ", got " + name);
}

}  // namespace convnest
