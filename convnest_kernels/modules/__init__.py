"""Modules that drop into any PyTorch ConvNet: [N, C, H, W] in, [N, C, H, W] out."""

from .layer_norm2d import LayerNorm2d
from .nested_block import NestedBlock

__all__ = ["LayerNorm2d", "NestedBlock"]
