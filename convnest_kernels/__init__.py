"""Custom kernels for wide depthwise ConvNet blocks: depthwise 7×7 + GELU + LayerNorm, NHWC.

ops          the operators (torch.autograd.Function over registered convnest::* operators)
NestedBlock  a drop-in ConvNeSt block over them
models       the 14 ConvNeSt models
accelerate   the operators inside the ConvNeXt models of timm, torchvision and transformers
layers       the same for Hugging Face's `kernels`
reference    every formula in plain PyTorch
"""

from __future__ import annotations

from . import layers, models, ops, reference
from ._version import __version__
from .adopt import accelerate
from .backends import BackendError, use_backend
from .explanation import explain
from .modules import NestedBlock

__all__ = [
    "BackendError",
    "NestedBlock",
    "__version__",
    "accelerate",
    "explain",
    "layers",
    "models",
    "ops",
    "reference",
    "use_backend",
]
