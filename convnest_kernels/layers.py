"""Layers for Hugging Face's `kernels`: a library's ConvNeXt block over our operators.

`kernelize` gives the forward of such a layer to the blocks of a model (docs/adoption.md). As
it demands, a layer has no state and no other method: `self` is the library's block. Where ours
would not be the same computation in some call, the library's own forward runs, as in `accelerate`.
"""

from __future__ import annotations

from torch import Tensor, nn

from .adopt.fused import FAMILY, run

__all__ = [
    "CNBlock",
    "ConvNeXtBlock",
    "ConvNextLayer",
    "ConvNextV2Layer",
    "DINOv3ConvNextLayer",
]


def _forward(kind: str, block: nn.Module, x: Tensor) -> Tensor:
    y = run(FAMILY[kind], block, x, None)
    return type(block).forward(block, x) if y is None else y


class ConvNeXtBlock(nn.Module):
    """Of timm; V2's too."""

    can_torch_compile: bool = True

    def forward(self, x: Tensor) -> Tensor:
        return _forward("timm ConvNeXtBlock", self, x)


class CNBlock(nn.Module):
    """Of torchvision."""

    can_torch_compile: bool = True

    def forward(self, input: Tensor) -> Tensor:
        return _forward("torchvision CNBlock", self, input)


class ConvNextLayer(nn.Module):
    """Of transformers."""

    can_torch_compile: bool = True

    def forward(self, features: Tensor) -> Tensor:
        return _forward("transformers ConvNextLayer", self, features)


class ConvNextV2Layer(nn.Module):
    """Of transformers."""

    can_torch_compile: bool = True

    def forward(self, features: Tensor) -> Tensor:
        return _forward("transformers ConvNextV2Layer", self, features)


class DINOv3ConvNextLayer(nn.Module):
    """Of transformers."""

    can_torch_compile: bool = True

    def forward(self, features: Tensor) -> Tensor:
        return _forward("transformers DINOv3ConvNextLayer", self, features)
