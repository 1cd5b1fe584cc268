"""The formulas as a network in [N, C, H, W] has them: dense 1×1 convolutions, LayerNorm2d."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnest_kernels import NestedBlock


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6) -> Tensor:
    """LayerNorm over C of [N, C, H, W]."""
    y = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weight, bias, eps)
    return y.permute(0, 3, 1, 2)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])


def nested_conv(
    h: Tensor, conv_weight: Tensor, conv_bias: Tensor, ln_weight: Tensor, ln_bias: Tensor
) -> Tensor:
    g = F.gelu(h)
    return F.gelu(g + depthwise(layer_norm(g, ln_weight, ln_bias), conv_weight, conv_bias))


def dwconv_gelu_layernorm(
    x: Tensor, conv_weight: Tensor, conv_bias: Tensor, ln_weight: Tensor, ln_bias: Tensor,
    activation: str = "gelu",
) -> Tensor:  # fmt: skip
    c = depthwise(x, conv_weight, conv_bias)
    return layer_norm(F.gelu(c) if activation == "gelu" else c, ln_weight, ln_bias)


def gelu_layernorm(x: Tensor, ln_weight: Tensor, ln_bias: Tensor) -> Tensor:
    return layer_norm(F.gelu(x), ln_weight, ln_bias)


def layernorm_residual(
    t: Tensor, x: Tensor, ln_weight: Tensor, ln_bias: Tensor, scale: Tensor
) -> Tensor:
    return scale[:, None, None] * x + layer_norm(t, ln_weight, ln_bias)


class Block(nn.Module):
    """A NestedBlock of the `convnest` design with LayerNorms, in NCHW; shares its parameters."""

    def __init__(self, block: NestedBlock) -> None:
        super().__init__()
        self.conv_dw, self.mlp = block.conv_dw, block.mlp
        self.norm, self.norm2 = block.norm, block.norm2
        self.res_scale = block.res_scale

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2, conv = self.mlp.fc1, self.mlp.fc2, self.conv_dw
        h = F.conv2d(x, fc1.weight[:, :, None, None], fc1.bias)
        v = nested_conv(h, conv.weight, conv.bias, self.norm.weight, self.norm.bias)
        t = F.conv2d(v, fc2.weight[:, :, None, None], fc2.bias)
        branch = layer_norm(t, self.norm2.weight, self.norm2.bias)
        return branch + (x if self.res_scale is None else self.res_scale[:, None, None] * x)


def network(model: nn.Module) -> nn.Module:
    """A contiguous copy of a model with every NestedBlock as `Block`."""
    # A channels_last weight would make its convolution channels_last.
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, NestedBlock):
                setattr(parent, name, Block(child))
    return model
