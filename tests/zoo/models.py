"""Small, randomly initialised models of other libraries, each in both memory formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

DIMS, DEPTHS = (8, 12, 16, 20), (1, 1, 2, 1)
BLOCKS = sum(DEPTHS)


def _timm(**options: Any) -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    sizes = {"dims": DIMS, "depths": DEPTHS, "num_classes": 5}
    return timm.models.convnext.ConvNeXt(**{**sizes, **options})


def _torchvision(**options: Any) -> nn.Module:
    convnext = pytest.importorskip(
        "torchvision.models.convnext", reason="torchvision is not installed"
    )
    outs = (*DIMS[1:], None)
    blocks = [convnext.CNBlockConfig(*sizes) for sizes in zip(DIMS, outs, DEPTHS, strict=True)]
    options = {"layer_scale": 0.5, "num_classes": 5, **options}
    return convnext.ConvNeXt(blocks, **options)


def _transformers(kind: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(transformers, f"{kind}Config")(
        hidden_sizes=list(DIMS), depths=list(DEPTHS), **options
    )

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = getattr(transformers, f"{kind}Model")(config)

        def forward(self, x: Tensor) -> Tensor:
            return self.backbone(x).pooler_output

    return Pooled()


MAKERS: dict[str, Callable[..., nn.Module]] = {
    "timm": _timm,
    "timm-v2": lambda **options: _timm(use_grn=True, ls_init_value=None, **options),
    "timm-conv_mlp": lambda **options: _timm(conv_mlp=True, **options),
    "torchvision": _torchvision,
    "transformers": lambda **options: _transformers("ConvNext", **options),
    "transformers-v2": lambda **options: _transformers("ConvNextV2", **options),
    "dinov3": lambda **options: _transformers("DINOv3ConvNext", **options),
}

DROP_PATH = {"torchvision": "stochastic_depth_prob"}


def make(name: str, **options: Any) -> nn.Module:
    """A model whose every parameter is random and far from its initial value."""
    model = MAKERS[name](**options)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            spread = 0.2 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            parameter.copy_((parameter + spread * noise).to(parameter.dtype))
    return model


def images(channels_last: bool = False, size: int = 64) -> Tensor:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return x.to(memory_format=torch.channels_last) if channels_last else x


def run(model: nn.Module, x: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """The output and all gradients, by name."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad((y * weights).sum(), [x, *(p for _, p in named)], allow_unused=True)
    found = {"y": y.detach(), "x": grads[0]}
    return found | {name: g for (name, _), g in zip(named, grads[1:], strict=True) if g is not None}
