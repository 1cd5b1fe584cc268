"""Small random blocks, and the block's formula written apart from the library."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convnest_kernels import NestedBlock

DESIGNS = ["vanilla", "pre_activation", "post_norm", "convnest"]
NORMS = list(itertools.product(["layer", "batch"], repeat=2))


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """For files of tiny maps: threads cost more than the work, above all on a busy machine."""
    torch.set_num_threads(1)


def make(dim: int = 5, *, dtype: torch.dtype = torch.float64, **options: Any) -> NestedBlock:
    """A small block whose every parameter is random and far from its initial value."""
    options = {"expansion": 3, "kernel_size": 3, **options}
    block = NestedBlock(dim, **options).to(dtype)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            spread = 0.5 if parameter.dim() > 1 else 1.0
            nn.init.normal_(parameter, std=spread)
            if name in ("norm.weight", "norm2.weight", "res_scale", "gamma"):
                parameter += 1.5
    return block


def run(block: NestedBlock, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of everything, by name."""
    x = x.detach().requires_grad_()
    y = block(x)
    names, parameters = zip(*block.named_parameters(), strict=True)
    grads = torch.autograd.grad(y, (x, *parameters), dy)
    return {"y": y.detach(), "x": grads[0], **dict(zip(names, grads[1:], strict=True))}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


def formula(block: NestedBlock, x: Tensor, norms: tuple[str, str], shortcut: bool) -> Tensor:
    """The block in NCHW, by sums and products only."""
    p = dict(block.named_parameters())
    buffers = dict(block.named_buffers())

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    def pointwise(x: Tensor, name: str) -> Tensor:
        y = torch.einsum("nchw,dc->ndhw", x, p[f"{name}.weight"])
        return y + p[f"{name}.bias"][:, None, None]

    def depthwise(x: Tensor) -> Tensor:
        weight, r = p["conv_dw.weight"], block.kernel_size // 2
        height, width = x.shape[2:]
        padded = x.new_zeros(*x.shape[:2], height + 2 * r, width + 2 * r)
        padded[:, :, r : r + height, r : r + width] = x
        y = p["conv_dw.bias"][:, None, None].expand_as(x)
        for i, j in itertools.product(range(2 * r + 1), repeat=2):
            window = padded[:, :, i : i + height, j : j + width]
            y = y + weight[:, 0, i, j, None, None] * window
        return y

    def norm(x: Tensor, name: str, kind: str) -> Tensor:
        axes = (1,) if kind == "layer" else (0, 2, 3)
        if kind == "batch" and not block.training:
            mean = buffers[f"{name}.running_mean"][:, None, None]
            variance = buffers[f"{name}.running_var"][:, None, None]
        else:
            mean = x.mean(axes, keepdim=True)
            variance = (x - mean).square().mean(axes, keepdim=True)
        x = (x - mean) / (variance + block.eps).sqrt()
        return x * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    def first(x: Tensor) -> Tensor:
        return norm(x, "norm", norms[0])

    def second(x: Tensor) -> Tensor:
        return norm(x, "norm2", norms[1])

    h = pointwise(x, "mlp.fc1")
    if block.design == "vanilla":
        branch = pointwise(gelu(second(depthwise(gelu(first(h))))), "mlp.fc2")
    elif block.design == "pre_activation":
        branch = pointwise(second(gelu(depthwise(first(gelu(h))))), "mlp.fc2")
    else:
        g = gelu(h)
        u = depthwise(first(g)) + (g if block.design == "convnest" and shortcut else 0)
        branch = second(pointwise(gelu(u), "mlp.fc2"))
    if "gamma" in p:
        branch = branch * p["gamma"][:, None, None]
    return branch + (x * p["res_scale"][:, None, None] if "res_scale" in p else x)


def run_formula(
    block: NestedBlock, x: Tensor, dy: Tensor, norms: tuple[str, str], shortcut: bool
) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = formula(block, x, norms, shortcut)
    names, parameters = zip(*block.named_parameters(), strict=True)
    grads = torch.autograd.grad(y, (x, *parameters), dy)
    return {"y": y.detach(), "x": grads[0], **dict(zip(names, grads[1:], strict=True))}
