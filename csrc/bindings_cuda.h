// The module's `cuda` part: in the extension, and on the host emulation for the tests.
#pragma once

#include <pybind11/pybind11.h>

namespace convnest::cuda {

void bind(pybind11::module_& cuda);

}  // namespace convnest::cuda
