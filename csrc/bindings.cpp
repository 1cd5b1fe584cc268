// The Python module convnest_kernels._C: addresses and sizes in, nothing out.
//
// It trusts the addresses, shapes and dtypes that it is given; convnest_kernels.ops checks them.
// An address of 0 is null. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(CONVNEST_HAS_CUDA)
#include "bindings_cuda.h"
#endif
#include "common/hash.h"
#include "common/parallel.h"
#include "dispatch.h"

namespace py = pybind11;

namespace convnest {
namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;

void* at(Address address) { return reinterpret_cast<void*>(address); }

DType dtype_of(int code) {
    if (code < 0 || code > 3) {
        throw std::invalid_argument(
            "dtype must be one of 0 (float32), 1 (float64), 2 (bfloat16), 3 "
            "(float16), got " +
            std::to_string(code));
    }
    return static_cast<DType>(code);
}

int kernel_size(int K) {
    if (K < 3 || K > 13 || K % 2 == 0) {
        throw std::invalid_argument("K must be one of 3, 5, 7, 9, 11, 13, got " +
                                    std::to_string(K));
    }
    return K;
}

bool empty(Size N, Size H, Size W, Size C) { return N <= 0 || H <= 0 || W <= 0 || C <= 0; }

void bind_conv_stems(py::module_& cpu) {
    const auto nogil = py::call_guard<py::gil_scoped_release>();
    cpu.def(
        "nested_conv_forward",
        [](Address h, Address conv_weight, Address conv_bias, Address ln_weight, Address ln_bias,
           Address v, Address u, Address mean, Address rstd, Size N, Size H, Size W, Size C, int K,
           double eps, bool shortcut, int dtype) {
            const NestedConvFwdParams params{at(h),
                                             at(conv_weight),
                                             at(conv_bias),
                                             at(ln_weight),
                                             at(ln_bias),
                                             at(v),
                                             at(u),
                                             at(mean),
                                             at(rstd),
                                             N,
                                             H,
                                             W,
                                             C,
                                             kernel_size(K),
                                             eps,
                                             shortcut,
                                             dtype_of(dtype)};
            if (!empty(N, H, W, C)) kernels().nested_conv_forward(params);
        },
        py::arg("h"), py::arg("conv_weight"), py::arg("conv_bias"), py::arg("ln_weight"),
        py::arg("ln_bias"), py::arg("v"), py::arg("u"), py::arg("mean"), py::arg("rstd"),
        py::arg("N"), py::arg("H"), py::arg("W"), py::arg("C"), py::arg("K"), py::arg("eps"),
        py::arg("shortcut"), py::arg("dtype"), nogil);
    cpu.def(
        "nested_conv_backward",
        [](Address dv, Address h, Address u, Address mean, Address rstd, Address conv_weight,
           Address ln_weight, Address ln_bias, Address dh, Address dconv_weight, Address dconv_bias,
           Address dln_weight, Address dln_bias, Size N, Size H, Size W, Size C, int K,
           bool shortcut, int dtype) {
            const NestedConvBwdParams params{at(dv),
                                             at(h),
                                             at(u),
                                             at(mean),
                                             at(rstd),
                                             at(conv_weight),
                                             at(ln_weight),
                                             at(ln_bias),
                                             at(dh),
                                             at(dconv_weight),
                                             at(dconv_bias),
                                             at(dln_weight),
                                             at(dln_bias),
                                             N,
                                             H,
                                             W,
                                             C,
                                             kernel_size(K),
                                             shortcut,
                                             dtype_of(dtype)};
            if (!empty(N, H, W, C)) kernels().nested_conv_backward(params);
        },
        py::arg("dv"), py::arg("h"), py::arg("u"), py::arg("mean"), py::arg("rstd"),
        py::arg("conv_weight"), py::arg("ln_weight"), py::arg("ln_bias"), py::arg("dh"),
        py::arg("dconv_weight"), py::arg("dconv_bias"), py::arg("dln_weight"), py::arg("dln_bias"),
        py::arg("N"), py::arg("H"), py::arg("W"), py::arg("C"), py::arg("K"), py::arg("shortcut"),
        py::arg("dtype"), nogil);
    cpu.def(
        "dwconv_gelu_layernorm_forward",
        [](Address x, Address conv_weight, Address conv_bias, Address ln_weight, Address ln_bias,
           Address y, Address c, Address mean, Address rstd, Size N, Size H, Size W, Size C, int K,
           double eps, bool gelu, bool norm_first, int dtype) {
            const DwconvGeluLayernormFwdParams params{at(x),
                                                      at(conv_weight),
                                                      at(conv_bias),
                                                      at(ln_weight),
                                                      at(ln_bias),
                                                      at(y),
                                                      at(c),
                                                      at(mean),
                                                      at(rstd),
                                                      N,
                                                      H,
                                                      W,
                                                      C,
                                                      kernel_size(K),
                                                      eps,
                                                      gelu,
                                                      norm_first,
                                                      dtype_of(dtype)};
            if (!empty(N, H, W, C)) kernels().dwconv_gelu_layernorm_forward(params);
        },
        py::arg("x"), py::arg("conv_weight"), py::arg("conv_bias"), py::arg("ln_weight"),
        py::arg("ln_bias"), py::arg("y"), py::arg("c"), py::arg("mean"), py::arg("rstd"),
        py::arg("N"), py::arg("H"), py::arg("W"), py::arg("C"), py::arg("K"), py::arg("eps"),
        py::arg("gelu"), py::arg("norm_first"), py::arg("dtype"), nogil);
    cpu.def(
        "dwconv_gelu_layernorm_backward",
        [](Address dy, Address x, Address c, Address mean, Address rstd, Address conv_weight,
           Address ln_weight, Address ln_bias, Address dx, Address dconv_weight, Address dconv_bias,
           Address dln_weight, Address dln_bias, Size N, Size H, Size W, Size C, int K, bool gelu,
           bool norm_first, int dtype) {
            const DwconvGeluLayernormBwdParams params{at(dy),
                                                      at(x),
                                                      at(c),
                                                      at(mean),
                                                      at(rstd),
                                                      at(conv_weight),
                                                      at(ln_weight),
                                                      at(ln_bias),
                                                      at(dx),
                                                      at(dconv_weight),
                                                      at(dconv_bias),
                                                      at(dln_weight),
                                                      at(dln_bias),
                                                      N,
                                                      H,
                                                      W,
                                                      C,
                                                      kernel_size(K),
                                                      gelu,
                                                      norm_first,
                                                      dtype_of(dtype)};
            if (!empty(N, H, W, C)) kernels().dwconv_gelu_layernorm_backward(params);
        },
        py::arg("dy"), py::arg("x"), py::arg("c"), py::arg("mean"), py::arg("rstd"),
        py::arg("conv_weight"), py::arg("ln_weight"), py::arg("ln_bias"), py::arg("dx"),
        py::arg("dconv_weight"), py::arg("dconv_bias"), py::arg("dln_weight"), py::arg("dln_bias"),
        py::arg("N"), py::arg("H"), py::arg("W"), py::arg("C"), py::arg("K"), py::arg("gelu"),
        py::arg("norm_first"), py::arg("dtype"), nogil);
}

void bind_row_stems(py::module_& cpu) {
    const auto nogil = py::call_guard<py::gil_scoped_release>();
    cpu.def(
        "gelu_layernorm_forward",
        [](Address x, Address ln_weight, Address ln_bias, Address y, Address mean, Address rstd,
           Size rows, Size C, double eps, bool norm_first, int dtype) {
            const GeluLayernormFwdParams params{at(x),    at(ln_weight), at(ln_bias),    at(y),
                                                at(mean), at(rstd),      rows,           C,
                                                eps,      norm_first,    dtype_of(dtype)};
            if (!empty(rows, 1, 1, C)) kernels().gelu_layernorm_forward(params);
        },
        py::arg("x"), py::arg("ln_weight"), py::arg("ln_bias"), py::arg("y"), py::arg("mean"),
        py::arg("rstd"), py::arg("rows"), py::arg("C"), py::arg("eps"), py::arg("norm_first"),
        py::arg("dtype"), nogil);
    cpu.def(
        "gelu_layernorm_backward",
        [](Address dy, Address x, Address mean, Address rstd, Address ln_weight, Address ln_bias,
           Address dx, Address dln_weight, Address dln_bias, Size rows, Size C, bool norm_first,
           int dtype) {
            const GeluLayernormBwdParams params{
                at(dy),      at(x),      at(mean),       at(rstd),     at(ln_weight),
                at(ln_bias), at(dx),     at(dln_weight), at(dln_bias), rows,
                C,           norm_first, dtype_of(dtype)};
            if (!empty(rows, 1, 1, C)) kernels().gelu_layernorm_backward(params);
        },
        py::arg("dy"), py::arg("x"), py::arg("mean"), py::arg("rstd"), py::arg("ln_weight"),
        py::arg("ln_bias"), py::arg("dx"), py::arg("dln_weight"), py::arg("dln_bias"),
        py::arg("rows"), py::arg("C"), py::arg("norm_first"), py::arg("dtype"), nogil);
    cpu.def(
        "layernorm_residual_forward",
        [](Address t, Address x, Address ln_weight, Address ln_bias, Address scale, Address y,
           Address mean, Address rstd, Size rows, Size C, double eps, int dtype) {
            const LayernormResidualFwdParams params{
                at(t),    at(x),    at(ln_weight), at(ln_bias), at(scale), at(y),
                at(mean), at(rstd), rows,          C,           eps,       dtype_of(dtype)};
            if (!empty(rows, 1, 1, C)) kernels().layernorm_residual_forward(params);
        },
        py::arg("t"), py::arg("x"), py::arg("ln_weight"), py::arg("ln_bias"), py::arg("scale"),
        py::arg("y"), py::arg("mean"), py::arg("rstd"), py::arg("rows"), py::arg("C"),
        py::arg("eps"), py::arg("dtype"), nogil);
    cpu.def(
        "layernorm_residual_backward",
        [](Address dy, Address t, Address x, Address mean, Address rstd, Address ln_weight,
           Address scale, Address dt, Address dx, Address dln_weight, Address dln_bias,
           Address dscale, Size rows, Size C, int dtype) {
            const LayernormResidualBwdParams params{
                at(dy),        at(t),      at(x),  at(mean), at(rstd),
                at(ln_weight), at(scale),  at(dt), at(dx),   at(dln_weight),
                at(dln_bias),  at(dscale), rows,   C,        dtype_of(dtype)};
            if (!empty(rows, 1, 1, C)) kernels().layernorm_residual_backward(params);
        },
        py::arg("dy"), py::arg("t"), py::arg("x"), py::arg("mean"), py::arg("rstd"),
        py::arg("ln_weight"), py::arg("scale"), py::arg("dt"), py::arg("dx"), py::arg("dln_weight"),
        py::arg("dln_bias"), py::arg("dscale"), py::arg("rows"), py::arg("C"), py::arg("dtype"),
        nogil);
}

// Addresses in the order of the structs in nested_block.h.
void bind_nested_block(py::module_& cpu) {
    cpu.def(
        "nested_block_forward",
        [](const std::array<Address, 13>& in, const std::array<Address, 8>& out, Size N, Size H,
           Size W, Size C, Size D, int K, double eps, bool shortcut, int dtype) {
            const NestedBlockFwdParams params{
                at(in[0]),  at(in[1]),  at(in[2]),      at(in[3]),  at(in[4]),  at(in[5]),
                at(in[6]),  at(in[7]),  at(in[8]),      at(in[9]),  at(in[10]), at(in[11]),
                at(in[12]), at(out[0]), at(out[1]),     at(out[2]), at(out[3]), at(out[4]),
                at(out[5]), at(out[6]), at(out[7]),     N,          H,          W,
                C,          D,          kernel_size(K), eps,        shortcut,   dtype_of(dtype)};
            if (!empty(N, H, W, C)) kernels().nested_block_forward(params);
        },
        py::arg("inputs"), py::arg("outputs"), py::arg("N"), py::arg("H"), py::arg("W"),
        py::arg("C"), py::arg("D"), py::arg("K"), py::arg("eps"), py::arg("shortcut"),
        py::arg("dtype"), py::call_guard<py::gil_scoped_release>());
}

void bind_nested_block_packing(py::module_& cpu) {
    cpu.def(
        "nested_block_pack",
        [](Address fc1_weight, Address conv_weight, Address fc2_weight, Size C, Size D, int K,
           int dtype, Address packed) {
            NestedBlockFwdParams params{};
            params.fc1_weight = at(fc1_weight);
            params.conv_weight = at(conv_weight);
            params.fc2_weight = at(fc2_weight);
            params.H = params.W = 1;
            params.C = C;
            params.D = D;
            params.K = kernel_size(K);
            params.dtype = dtype_of(dtype);
            const std::int64_t bytes = kernels().nested_block_pack(params, nullptr);
            if (packed == 0) return bytes;
            ask_for_huge_pages(at(packed), static_cast<std::size_t>(bytes));
            return kernels().nested_block_pack(params, at(packed));
        },
        py::arg("fc1_weight"), py::arg("conv_weight"), py::arg("fc2_weight"), py::arg("C"),
        py::arg("D"), py::arg("K"), py::arg("dtype"), py::arg("packed"),
        py::call_guard<py::gil_scoped_release>(),
        "Pack the weights for nested_block_forward into 64-byte aligned memory; returns the bytes "
        "of it, which is all that it does with packed=0.");
    cpu.def("hash_words", hash_words, py::arg("addresses"), py::arg("bytes"), py::arg("all"),
            py::call_guard<py::gil_scoped_release>(),
            "A hash of these stretches of memory: of some of their words, or of all.");
}

void bind_nested_block_backward(py::module_& cpu) {
    cpu.def(
        "nested_block_backward",
        [](const std::array<Address, 18>& in, const std::array<Address, 12>& out, Size N, Size H,
           Size W, Size C, Size D, int K, double eps, bool shortcut, int dtype) {
            const NestedBlockBwdParams params{at(in[0]),  at(in[1]),   at(in[2]),
                                              at(in[3]),  at(in[4]),   at(in[5]),
                                              at(in[6]),  at(in[7]),   at(in[8]),
                                              at(in[9]),  at(in[10]),  at(in[11]),
                                              at(in[12]), at(in[13]),  at(in[14]),
                                              at(in[15]), at(in[16]),  at(in[17]),
                                              at(out[0]), at(out[1]),  at(out[2]),
                                              at(out[3]), at(out[4]),  at(out[5]),
                                              at(out[6]), at(out[7]),  at(out[8]),
                                              at(out[9]), at(out[10]), at(out[11]),
                                              N,          H,           W,
                                              C,          D,           kernel_size(K),
                                              eps,        shortcut,    dtype_of(dtype)};
            if (!empty(N, H, W, C)) kernels().nested_block_backward(params);
        },
        py::arg("inputs"), py::arg("outputs"), py::arg("N"), py::arg("H"), py::arg("W"),
        py::arg("C"), py::arg("D"), py::arg("K"), py::arg("eps"), py::arg("shortcut"),
        py::arg("dtype"), py::call_guard<py::gil_scoped_release>());
}

void bind_control(py::module_& cpu) {
    cpu.def("isas", runnable_isas, "The instruction sets that run here, best last.");
    cpu.def("isa", [] { return std::string(kernels().isa); }, "The active instruction set.");
    cpu.def("set_isa", set_isa, py::arg("name"),
            "Choose the instruction set; ValueError lists what is possible.");
    cpu.def("num_threads", num_threads, "The number of threads that a kernel may use.");
    cpu.def(
        "set_num_threads",
        [](int count) {
            if (count < 1) {
                throw std::invalid_argument("count must be at least 1, got " +
                                            std::to_string(count));
            }
            set_num_threads(count);
        },
        py::arg("count"), "Size our own thread pool; RuntimeError when torch's is in use.");
    cpu.def(
        "use_thread_pool",
        [](Address parallel_for, Address get_num_threads) {
            if ((parallel_for == 0) != (get_num_threads == 0)) {
                throw std::invalid_argument("give both addresses, or 0 and 0 for our own pool");
            }
            use_thread_pool(parallel_for, get_num_threads);
        },
        py::arg("parallel_for_address"), py::arg("get_num_threads_address"),
        "Run on the pool behind torch_parallel_for and torch_get_num_threads; 0, 0 undoes it.");
}

py::dict build_info() {
    py::dict info;
    info["compiler"] = CONVNEST_COMPILER;
    info["cuda"] = CONVNEST_CUDA_VERSION;
    info["cuda_archs"] = py::str(CONVNEST_CUDA_ARCHS).attr("split")();
    info["cuda_reason"] = CONVNEST_CUDA_REASON;
    info["isas"] = compiled_isas();
    return info;
}

}  // namespace
}  // namespace convnest

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of convnest_kernels: addresses and sizes in, nothing out.";
    m.attr("float32") = static_cast<int>(convnest::DType::kFloat32);
    m.attr("float64") = static_cast<int>(convnest::DType::kFloat64);
    m.attr("bfloat16") = static_cast<int>(convnest::DType::kBFloat16);
    m.attr("float16") = static_cast<int>(convnest::DType::kFloat16);
    m.def("build_info", convnest::build_info, "How this module was built.");
    py::module_ cpu = m.def_submodule("cpu", "Kernels on the CPU.");
    convnest::bind_conv_stems(cpu);
    convnest::bind_row_stems(cpu);
    convnest::bind_nested_block(cpu);
    convnest::bind_nested_block_packing(cpu);
    convnest::bind_nested_block_backward(cpu);
    convnest::bind_control(cpu);
#if defined(CONVNEST_HAS_CUDA)
    py::module_ cuda = m.def_submodule("cuda", "Kernels on CUDA devices.");
    convnest::cuda::bind(cuda);
#endif
}
