"""Small, randomly initialised models of other libraries, and how accelerated ones are judged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convnest_kernels.adopt import fused as fused_module
from tests.tolerances import assert_accurate

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


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every input of our convolution and norm: what shows that ours ran."""
    inputs: list[Tensor] = []
    ours = fused_module.conv_norm

    def spy(x: Tensor, *args: object) -> Tensor:
        inputs.append(x)
        return ours(x, *args)

    monkeypatch.setattr(fused_module, "conv_norm", spy)
    return inputs


def assert_same_numbers(ours: nn.Module, theirs: nn.Module, x: Tensor, autocast: bool) -> None:
    truth = run(copy.deepcopy(theirs).double(), x.double())
    eager, got = run(theirs, x, autocast), run(ours, x, autocast)
    assert got.keys() == eager.keys() == truth.keys()
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    if not autocast:
        for name, value in got.items():
            assert_accurate(name, value, eager[name], truth[name], rows=rows)
        return
    # bfloat16 through a whole network: a gradient of few elements is off by chance, more or less,
    # so each may be off by more than eager's, but not all of them together.
    total = {"ours": 0.0, "eager": 0.0}
    for name, value in got.items():
        assert value.dtype == eager[name].dtype
        size = truth[name].norm()
        of_ours, of_eager = ((g.double() - truth[name]).norm() for g in (value, eager[name]))
        floor = torch.finfo(torch.bfloat16).eps * size
        assert of_ours <= 4 * of_eager + floor, f"{name} is off by {of_ours}, eager by {of_eager}"
        total["ours"] += (of_ours / size).item() ** 2
        total["eager"] += (of_eager / size).item() ** 2
    assert total["ours"] <= 1.5 * total["eager"], total
