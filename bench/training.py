"""training: a real step of a whole ConvNeSt: forward, cross-entropy, backward, AdamW."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import model
from bench.cells import Cell
from bench.work import Work


def labels(batch: int, device: torch.device) -> Tensor:
    return (torch.arange(batch, device=device) * 37) % 1000


def loss_of(network: nn.Module, x: Tensor) -> Tensor:
    """Cross-entropy with label smoothing, as ConvNets are trained."""
    return F.cross_entropy(network(x).float(), labels(len(x), x.device), label_smoothing=0.1)


def step(network: nn.Module, inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
    """A training step; each one moves the parameters on."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, weight_decay=0.05)

    def run() -> Tensor:
        loss = loss_of(network, inputs[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def build(cell: Cell) -> Work:
    """The work of `model`, trained; logits and gradients are checked before the first step."""
    return dataclasses.replace(model.build(cell), step=step)
