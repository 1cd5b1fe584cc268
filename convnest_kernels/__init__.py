"""Custom kernels for wide depthwise ConvNet blocks: depthwise 7×7 + GELU + LayerNorm, NHWC.

ops          the operators (torch.autograd.Function over registered convnest::* operators)
NestedBlock  a drop-in ConvNeSt block over them
models       the 14 ConvNeSt models
accelerate   the operators inside the ConvNeXt models of timm, torchvision and transformers
reference    every formula in plain PyTorch
"""

from __future__ import annotations

from convnest_kernels import models, ops, reference
from convnest_kernels._version import __version__
from convnest_kernels.adopt import accelerate
from convnest_kernels.backends import BackendError, use_backend
from convnest_kernels.explanation import explain
from convnest_kernels.modules import NestedBlock

__all__ = [
    "BackendError",
    "NestedBlock",
    "__version__",
    "accelerate",
    "explain",
    "models",
    "ops",
    "reference",
    "use_backend",
]
