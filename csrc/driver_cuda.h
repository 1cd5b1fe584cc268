// Versions of CUDA, as 1000·major + 10·minor: what the kernels were built with, and what the
// machine's driver can run (0 without a driver).
#pragma once

namespace convnest::cuda {

int runtime_version();
int driver_version();

}  // namespace convnest::cuda
