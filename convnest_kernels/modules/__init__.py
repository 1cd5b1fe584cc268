"""Modules that drop into any PyTorch ConvNet: [N, C, H, W] in, [N, C, H, W] out."""

from convnest_kernels.modules.layer_norm2d import LayerNorm2d
from convnest_kernels.modules.nested_block import NestedBlock

__all__ = ["LayerNorm2d", "NestedBlock"]
