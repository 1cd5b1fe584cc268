"""Models of the paper's make, but of a few channels and blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convnest_kernels.models import ConvNeSt, create_model

SMALL: dict[str, Any] = {"dims": (4, 8, 12, 16), "depths": (1, 1, 2, 1), "expansion": 3}
SMALL_ISO: dict[str, Any] = {"dims": (8,), "depths": (6,), "expansion": 3}


def sizes(name: str) -> dict[str, Any]:
    """Overrides that make the model `name` small."""
    return SMALL_ISO if "iso" in name else SMALL


def small(name: str = "convnest_atto", **options: Any) -> ConvNeSt:
    """A model of the same make as `name`, but of a few channels; every parameter random."""
    model = create_model(name, **{"num_classes": 7, **sizes(name), **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    return grads  # type: ignore[return-value]
