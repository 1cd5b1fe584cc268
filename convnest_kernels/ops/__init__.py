"""The operators: channels-last, differentiable, one public function each.

nested_conv              GELU(g + DW(LN(g))), g = GELU(h)
dwconv_gelu_layernorm    LN(act(DW(x))), or act(LN(DW(x)))
gelu_layernorm           LN(GELU(x)), or GELU(LN(x))
layernorm_residual       s ⊙ x + LN(t)
nested_block             the whole ConvNeSt block
"""

from __future__ import annotations

from .dwconv_gelu_layernorm import dwconv_gelu_layernorm
from .gelu_layernorm import gelu_layernorm
from .layernorm_residual import layernorm_residual
from .nested_block import nested_block
from .nested_conv import nested_conv

__all__ = [
    "dwconv_gelu_layernorm",
    "gelu_layernorm",
    "layernorm_residual",
    "nested_block",
    "nested_conv",
]
