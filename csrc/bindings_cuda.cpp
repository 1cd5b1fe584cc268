// The CUDA kernels for Python: addresses, sizes and a stream in, nothing out.
//
// As in bindings.cpp, addresses are trusted and 0 is null. Inputs come first, then outputs, the
// workspace last of them; a launch goes to `stream` on the current device and does not wait. Sizes
// that a kernel cannot take are a ValueError, CUDA's errors a RuntimeError that names the launch.
#include "bindings_cuda.h"

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "driver_cuda.h"
#include "dwconv_gelu_layernorm_cuda.h"
#include "gelu_layernorm_cuda.h"
#include "layernorm_residual_cuda.h"
#include "nested_conv_cuda.h"

namespace py = pybind11;

namespace convnest::cuda {
namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;

// An address as the pointer that a parameter struct wants.
struct At {
    Address address;

    template <class T>
    operator T*() const {
        return reinterpret_cast<T*>(address);
    }
};

ElementType element_type(int dtype) {
    switch (static_cast<DType>(dtype)) {
        case DType::kFloat32: return ElementType::float32;
        case DType::kBFloat16: return ElementType::bfloat16;
        case DType::kFloat16: return ElementType::float16;
        default:
            throw std::invalid_argument(
                "dtype must be 0 (float32), 2 (bfloat16) or 3 (float16), got " +
                std::to_string(dtype));
    }
}

int to_int(const char* name, Size size) {
    if (size < 0 || size > std::numeric_limits<int>::max()) {
        throw std::invalid_argument(std::string(name) + " must be from 0 to 2^31 - 1, got " +
                                    std::to_string(size));
    }
    return static_cast<int>(size);
}

// N, H, W and C of a convolution, each in range; their product is the launch's to check.
struct Extent {
    int N, H, W, C;

    Extent(Size N, Size H, Size W, Size C)
        : N(to_int("N", N)), H(to_int("H", H)), W(to_int("W", W)), C(to_int("C", C)) {}
    bool empty() const { return N == 0 || H == 0 || W == 0 || C == 0; }
};

void bind_nested_conv(py::module_& cuda) {
    const auto nogil = py::call_guard<py::gil_scoped_release>();
    cuda.def(
        "nested_conv_forward",
        [](Address h, Address conv_weight, Address conv_bias, Address ln_weight, Address ln_bias,
           Address v, Address u, Address mean, Address rstd, Size N, Size H, Size W, Size C, int K,
           float eps, bool shortcut, int dtype, Address stream) {
            const Extent extent(N, H, W, C);
            const NestedConvFwdParams params{.h = At{h},
                                             .conv_weight = At{conv_weight},
                                             .conv_bias = At{conv_bias},
                                             .ln_weight = At{ln_weight},
                                             .ln_bias = At{ln_bias},
                                             .v = At{v},
                                             .u = At{u},
                                             .mean = At{mean},
                                             .rstd = At{rstd},
                                             .N = extent.N,
                                             .H = extent.H,
                                             .W = extent.W,
                                             .C = extent.C,
                                             .eps = eps,
                                             .shortcut = shortcut};
            if (!extent.empty()) launch_nested_conv_fwd(params, K, element_type(dtype), At{stream});
        },
        py::arg("h"), py::arg("conv_weight"), py::arg("conv_bias"), py::arg("ln_weight"),
        py::arg("ln_bias"), py::arg("v"), py::arg("u"), py::arg("mean"), py::arg("rstd"),
        py::arg("N"), py::arg("H"), py::arg("W"), py::arg("C"), py::arg("K"), py::arg("eps"),
        py::arg("shortcut"), py::arg("dtype"), py::arg("stream"), nogil);
    cuda.def(
        "nested_conv_backward_workspace",
        [](Address dv, Address h, Address u, Address dh, Size N, Size H, Size W, Size C, int K,
           int dtype) -> std::size_t {
            const Extent extent(N, H, W, C);
            const ElementType type = element_type(dtype);
            check_nested_conv(extent.N, extent.H, extent.W, extent.C, K, type);
            if (extent.empty()) return 0;
            NestedConvBwdParams params{};
            params.dv = At{dv}, params.h = At{h}, params.u = At{u}, params.dh = At{dh};
            params.N = extent.N, params.H = extent.H, params.W = extent.W, params.C = extent.C;
            return nested_conv_bwd_workspace_bytes(params, K, type);
        },
        py::arg("dv"), py::arg("h"), py::arg("u"), py::arg("dh"), py::arg("N"), py::arg("H"),
        py::arg("W"), py::arg("C"), py::arg("K"), py::arg("dtype"),
        "Bytes of the backward's workspace, with these addresses on the current device.");
    cuda.def(
        "nested_conv_backward",
        [](Address dv, Address h, Address u, Address mean, Address rstd, Address conv_weight,
           Address ln_weight, Address ln_bias, Address dh, Address dconv_weight, Address dconv_bias,
           Address dln_weight, Address dln_bias, Address workspace, Size N, Size H, Size W, Size C,
           int K, bool shortcut, int dtype, Address stream) {
            const Extent extent(N, H, W, C);
            const NestedConvBwdParams params{.dv = At{dv},
                                             .h = At{h},
                                             .u = At{u},
                                             .mean = At{mean},
                                             .rstd = At{rstd},
                                             .conv_weight = At{conv_weight},
                                             .ln_weight = At{ln_weight},
                                             .ln_bias = At{ln_bias},
                                             .dh = At{dh},
                                             .dconv_weight = At{dconv_weight},
                                             .dconv_bias = At{dconv_bias},
                                             .dln_weight = At{dln_weight},
                                             .dln_bias = At{dln_bias},
                                             .workspace = At{workspace},
                                             .N = extent.N,
                                             .H = extent.H,
                                             .W = extent.W,
                                             .C = extent.C,
                                             .shortcut = shortcut};
            if (!extent.empty()) launch_nested_conv_bwd(params, K, element_type(dtype), At{stream});
        },
        py::arg("dv"), py::arg("h"), py::arg("u"), py::arg("mean"), py::arg("rstd"),
        py::arg("conv_weight"), py::arg("ln_weight"), py::arg("ln_bias"), py::arg("dh"),
        py::arg("dconv_weight"), py::arg("dconv_bias"), py::arg("dln_weight"), py::arg("dln_bias"),
        py::arg("workspace"), py::arg("N"), py::arg("H"), py::arg("W"), py::arg("C"), py::arg("K"),
        py::arg("shortcut"), py::arg("dtype"), py::arg("stream"), nogil);
}

void bind_dwconv_gelu_layernorm(py::module_& cuda) {
    const auto nogil = py::call_guard<py::gil_scoped_release>();
    cuda.def(
        "dwconv_gelu_layernorm_forward",
        [](Address x, Address conv_weight, Address conv_bias, Address ln_weight, Address ln_bias,
           Address y, Address c, Address mean, Address rstd, Size N, Size H, Size W, Size C, int K,
           float eps, bool gelu, bool norm_first, int dtype, Address stream) {
            const Extent extent(N, H, W, C);
            const DwconvGeluLayerNormFwdParams params{.x = At{x},
                                                      .conv_weight = At{conv_weight},
                                                      .conv_bias = At{conv_bias},
                                                      .ln_weight = At{ln_weight},
                                                      .ln_bias = At{ln_bias},
                                                      .y = At{y},
                                                      .c = At{c},
                                                      .mean = At{mean},
                                                      .rstd = At{rstd},
                                                      .N = extent.N,
                                                      .H = extent.H,
                                                      .W = extent.W,
                                                      .C = extent.C,
                                                      .eps = eps,
                                                      .gelu = gelu,
                                                      .norm_first = norm_first};
            if (extent.empty()) return;
            launch_dwconv_gelu_layernorm_fwd(params, K, element_type(dtype), At{stream});
        },
        py::arg("x"), py::arg("conv_weight"), py::arg("conv_bias"), py::arg("ln_weight"),
        py::arg("ln_bias"), py::arg("y"), py::arg("c"), py::arg("mean"), py::arg("rstd"),
        py::arg("N"), py::arg("H"), py::arg("W"), py::arg("C"), py::arg("K"), py::arg("eps"),
        py::arg("gelu"), py::arg("norm_first"), py::arg("dtype"), py::arg("stream"), nogil);
    cuda.def(
        "dwconv_gelu_layernorm_backward_workspace",
        [](Size N, Size H, Size W, Size C, int K, int dtype) -> std::size_t {
            const Extent extent(N, H, W, C);
            const ElementType type = element_type(dtype);
            check_dwconv_gelu_layernorm(extent.N, extent.H, extent.W, extent.C, K, type);
            if (extent.empty()) return 0;
            return dwconv_gelu_layernorm_bwd_workspace_bytes(extent.N, extent.H, extent.W, extent.C,
                                                             K, type);
        },
        py::arg("N"), py::arg("H"), py::arg("W"), py::arg("C"), py::arg("K"), py::arg("dtype"),
        "Bytes of the backward's workspace.");
    cuda.def(
        "dwconv_gelu_layernorm_backward",
        [](Address dy, Address x, Address c, Address mean, Address rstd, Address conv_weight,
           Address ln_weight, Address ln_bias, Address dx, Address dconv_weight, Address dconv_bias,
           Address dln_weight, Address dln_bias, Address workspace, Size N, Size H, Size W, Size C,
           int K, bool gelu, bool norm_first, int dtype, Address stream) {
            const Extent extent(N, H, W, C);
            const DwconvGeluLayerNormBwdParams params{.dy = At{dy},
                                                      .x = At{x},
                                                      .c = At{c},
                                                      .mean = At{mean},
                                                      .rstd = At{rstd},
                                                      .conv_weight = At{conv_weight},
                                                      .ln_weight = At{ln_weight},
                                                      .ln_bias = At{ln_bias},
                                                      .dx = At{dx},
                                                      .dconv_weight = At{dconv_weight},
                                                      .dconv_bias = At{dconv_bias},
                                                      .dln_weight = At{dln_weight},
                                                      .dln_bias = At{dln_bias},
                                                      .workspace = At{workspace},
                                                      .N = extent.N,
                                                      .H = extent.H,
                                                      .W = extent.W,
                                                      .C = extent.C,
                                                      .gelu = gelu,
                                                      .norm_first = norm_first};
            if (extent.empty()) return;
            launch_dwconv_gelu_layernorm_bwd(params, K, element_type(dtype), At{stream});
        },
        py::arg("dy"), py::arg("x"), py::arg("c"), py::arg("mean"), py::arg("rstd"),
        py::arg("conv_weight"), py::arg("ln_weight"), py::arg("ln_bias"), py::arg("dx"),
        py::arg("dconv_weight"), py::arg("dconv_bias"), py::arg("dln_weight"), py::arg("dln_bias"),
        py::arg("workspace"), py::arg("N"), py::arg("H"), py::arg("W"), py::arg("C"), py::arg("K"),
        py::arg("gelu"), py::arg("norm_first"), py::arg("dtype"), py::arg("stream"), nogil);
}

void bind_gelu_layernorm(py::module_& cuda) {
    const auto nogil = py::call_guard<py::gil_scoped_release>();
    cuda.def(
        "gelu_layernorm_forward",
        [](Address x, Address ln_weight, Address ln_bias, Address y, Address mean, Address rstd,
           Size rows, Size C, float eps, bool norm_first, int dtype, Address stream) {
            const GeluLayerNormFwdParams params{.x = At{x},
                                                .ln_weight = At{ln_weight},
                                                .ln_bias = At{ln_bias},
                                                .y = At{y},
                                                .mean = At{mean},
                                                .rstd = At{rstd},
                                                .rows = rows,
                                                .C = to_int("C", C),
                                                .eps = eps,
                                                .norm_first = norm_first};
            if (rows == 0 || C == 0) return;
            launch_gelu_layernorm_fwd(params, element_type(dtype), At{stream});
        },
        py::arg("x"), py::arg("ln_weight"), py::arg("ln_bias"), py::arg("y"), py::arg("mean"),
        py::arg("rstd"), py::arg("rows"), py::arg("C"), py::arg("eps"), py::arg("norm_first"),
        py::arg("dtype"), py::arg("stream"), nogil);
    cuda.def(
        "gelu_layernorm_backward_workspace",
        [](Size rows, Size C) { return gelu_layernorm_bwd_workspace_bytes(rows, to_int("C", C)); },
        py::arg("rows"), py::arg("C"), "Bytes of the backward's workspace.");
    cuda.def(
        "gelu_layernorm_backward",
        [](Address dy, Address x, Address mean, Address rstd, Address ln_weight, Address ln_bias,
           Address dx, Address dln_weight, Address dln_bias, Address workspace, Size rows, Size C,
           bool norm_first, int dtype, Address stream) {
            const GeluLayerNormBwdParams params{.dy = At{dy},
                                                .x = At{x},
                                                .mean = At{mean},
                                                .rstd = At{rstd},
                                                .ln_weight = At{ln_weight},
                                                .ln_bias = At{ln_bias},
                                                .dx = At{dx},
                                                .dln_weight = At{dln_weight},
                                                .dln_bias = At{dln_bias},
                                                .workspace = At{workspace},
                                                .rows = rows,
                                                .C = to_int("C", C),
                                                .norm_first = norm_first};
            if (rows == 0 || C == 0) return;
            launch_gelu_layernorm_bwd(params, element_type(dtype), At{stream});
        },
        py::arg("dy"), py::arg("x"), py::arg("mean"), py::arg("rstd"), py::arg("ln_weight"),
        py::arg("ln_bias"), py::arg("dx"), py::arg("dln_weight"), py::arg("dln_bias"),
        py::arg("workspace"), py::arg("rows"), py::arg("C"), py::arg("norm_first"),
        py::arg("dtype"), py::arg("stream"), nogil);
}

void bind_layernorm_residual(py::module_& cuda) {
    const auto nogil = py::call_guard<py::gil_scoped_release>();
    cuda.def(
        "layernorm_residual_forward",
        [](Address t, Address x, Address ln_weight, Address ln_bias, Address scale, Address y,
           Address mean, Address rstd, Size rows, Size C, float eps, int dtype, Address stream) {
            const LayerNormResidualFwdParams params{.t = At{t},
                                                    .x = At{x},
                                                    .ln_weight = At{ln_weight},
                                                    .ln_bias = At{ln_bias},
                                                    .scale = At{scale},
                                                    .y = At{y},
                                                    .mean = At{mean},
                                                    .rstd = At{rstd},
                                                    .rows = rows,
                                                    .C = to_int("C", C),
                                                    .eps = eps};
            if (rows == 0 || C == 0) return;
            launch_layernorm_residual_fwd(params, element_type(dtype), At{stream});
        },
        py::arg("t"), py::arg("x"), py::arg("ln_weight"), py::arg("ln_bias"), py::arg("scale"),
        py::arg("y"), py::arg("mean"), py::arg("rstd"), py::arg("rows"), py::arg("C"),
        py::arg("eps"), py::arg("dtype"), py::arg("stream"), nogil);
    cuda.def(
        "layernorm_residual_backward_workspace",
        [](Size rows, Size C) {
            return layernorm_residual_bwd_workspace_bytes(rows, to_int("C", C));
        },
        py::arg("rows"), py::arg("C"), "Bytes of the backward's workspace.");
    cuda.def(
        "layernorm_residual_backward",
        [](Address dy, Address t, Address x, Address mean, Address rstd, Address ln_weight,
           Address scale, Address dt, Address dx, Address dln_weight, Address dln_bias,
           Address dscale, Address workspace, Size rows, Size C, int dtype, Address stream) {
            const LayerNormResidualBwdParams params{.dy = At{dy},
                                                    .t = At{t},
                                                    .x = At{x},
                                                    .mean = At{mean},
                                                    .rstd = At{rstd},
                                                    .ln_weight = At{ln_weight},
                                                    .scale = At{scale},
                                                    .dt = At{dt},
                                                    .dx = At{dx},
                                                    .dln_weight = At{dln_weight},
                                                    .dln_bias = At{dln_bias},
                                                    .dscale = At{dscale},
                                                    .workspace = At{workspace},
                                                    .rows = rows,
                                                    .C = to_int("C", C)};
            if (rows == 0 || C == 0) return;
            launch_layernorm_residual_bwd(params, element_type(dtype), At{stream});
        },
        py::arg("dy"), py::arg("t"), py::arg("x"), py::arg("mean"), py::arg("rstd"),
        py::arg("ln_weight"), py::arg("scale"), py::arg("dt"), py::arg("dx"), py::arg("dln_weight"),
        py::arg("dln_bias"), py::arg("dscale"), py::arg("workspace"), py::arg("rows"), py::arg("C"),
        py::arg("dtype"), py::arg("stream"), nogil);
}

}  // namespace

void bind(py::module_& cuda) {
    cuda.attr("float32") = static_cast<int>(DType::kFloat32);
    cuda.attr("bfloat16") = static_cast<int>(DType::kBFloat16);
    cuda.attr("float16") = static_cast<int>(DType::kFloat16);
    cuda.def("runtime_version", runtime_version,
             "The CUDA that the kernels were built with, as 1000 * major + 10 * minor.");
    cuda.def("driver_version", driver_version, "What the driver can run; 0 without a driver.");
    bind_nested_conv(cuda);
    bind_dwconv_gelu_layernorm(cuda);
    bind_gelu_layernorm(cuda);
    bind_layernorm_residual(cuda);
}

}  // namespace convnest::cuda
