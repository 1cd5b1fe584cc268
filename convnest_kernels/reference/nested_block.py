"""The whole block, eager, in each of the paper's designs: x → y in NHWC.

D = expansion · C is the wide channel count. `norm` is the first LayerNorm, over D; `post` the
second, over D in `vanilla` and `pre_activation` and over C in `post_norm` and `convnest`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .common import depthwise_conv, layer_norm, linear
from .nested_conv import nested_conv


def _shortcut(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else scale.to(x.dtype) * x


def vanilla(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    scale: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """W1, LN, GELU, DW, LN, GELU, W2, + s ⊙ x."""
    h = linear(x, fc1_weight, fc1_bias)
    z = F.gelu(layer_norm(h, norm_weight, norm_bias, eps))
    u = depthwise_conv(z, conv_weight, conv_bias)
    v = F.gelu(layer_norm(u, post_weight, post_bias, eps))
    return _shortcut(x, scale) + linear(v, fc2_weight, fc2_bias)


def pre_activation(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    scale: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """W1, GELU, LN, DW, GELU, LN, W2, + s ⊙ x."""
    h = linear(x, fc1_weight, fc1_bias)
    z = layer_norm(F.gelu(h), norm_weight, norm_bias, eps)
    u = depthwise_conv(z, conv_weight, conv_bias)
    v = layer_norm(F.gelu(u), post_weight, post_bias, eps)
    return _shortcut(x, scale) + linear(v, fc2_weight, fc2_bias)


def convnest(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    scale: Tensor | None = None,
    *,
    eps: float = 1e-6,
    shortcut: bool = True,
) -> Tensor:
    """W1, GELU, LN, DW, + GELU(h), GELU, W2, LN, + s ⊙ x; `post_norm` where shortcut is False."""
    h = linear(x, fc1_weight, fc1_bias)
    v = nested_conv(h, conv_weight, conv_bias, norm_weight, norm_bias, eps=eps, shortcut=shortcut)
    t = linear(v, fc2_weight, fc2_bias)
    return _shortcut(x, scale) + layer_norm(t, post_weight, post_bias, eps)


nested_block = convnest
