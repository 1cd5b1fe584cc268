"""The eager reference: every operator and block design in plain PyTorch, formula by formula.

It runs on any device and in any floating dtype, under every torch transform, and is the truth that
tests compare with (in float64). It is also the backend "eager".
"""

from __future__ import annotations

from ..backends import Call
from .dwconv_gelu_layernorm import dwconv_gelu_layernorm
from .gelu_layernorm import gelu_layernorm
from .layernorm_residual import layernorm_residual
from .nested_block import (
    convnest,
    nested_block,
    pre_activation,
    vanilla,
)
from .nested_conv import nested_conv

name = "eager"

__all__ = [
    "convnest",
    "dwconv_gelu_layernorm",
    "gelu_layernorm",
    "layernorm_residual",
    "nested_block",
    "nested_conv",
    "pre_activation",
    "vanilla",
]


def reasons_against(call: Call) -> list[str]:
    """Nothing is against the eager formulas: PyTorch runs them everywhere."""
    return []
