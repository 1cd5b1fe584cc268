"""Work: what a cell computes, in the forms that contenders run, with its inputs and its cost.

Every form is an nn.Module over [N, C, H, W] with the same parameters. "ours" and "nhwc" are given
channels_last tensors, of which an operator sees the NHWC view, and "nchw" contiguous ones; "ours"
is given what the cell says.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import Inputs
from bench.cells import Cell

FORMATS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
# Images of a batch whose numbers are held against float64; a network's take longest.
CHECKED_IMAGES, CHECKED_IN_NETWORKS = 8, 2


@dataclass(frozen=True)
class Cost:
    """What a forward pass must do, however it is done; a training step counts as three of them.

    Taps in the padding do not count, nor does the arithmetic of the norms.
    """

    linear_flops: float  # of linear layers and dense convolutions
    conv_flops: float  # of depthwise convolutions, whose sums are float32
    gelus: float
    bytes_infer: float  # inputs and outputs once each
    bytes_train: float

    @property
    def flops(self) -> float:
        return self.linear_flops + self.conv_flops

    def of(self, mode: str) -> dict[str, float]:
        """FLOPs, GELUs and bytes of a mode."""
        times = 3 if mode == "train" else 1
        return {
            "flops": times * self.flops,
            "gelus": times * self.gelus,
            "bytes": self.bytes_train if mode == "train" else self.bytes_infer,
        }


@dataclass
class Work:
    """A cell's forms (at least "ours" and "nhwc"), inputs, cotangent and cost.

    `step` replaces forward and backward by a whole training step; `baselines` are networks of their
    own that are timed beside and checked against themselves.
    """

    cell: Cell
    forms: dict[str, nn.Module]
    inputs: tuple[Tensor, ...]
    dy: Tensor | None
    cost: Cost | None
    make_ours: Callable[[str], nn.Module]  # for a backend by name
    baselines: dict[str, Callable[[], nn.Module]]
    step: Callable[[nn.Module, Sequence[Tensor]], Callable[[], Any]] | None = None
    reference_form: str = "nhwc"

    def inputs_for(self, form: str) -> tuple[Tensor, ...]:
        """The inputs in a form's memory format, new leaves that want gradients in training."""
        train = self.cell.mode == "train" and self.step is None
        if form == "ours":
            form = "nhwc" if self.cell.memory_format == "channels_last" else "nchw"
        return tuple(
            x.detach().clone(memory_format=FORMATS[form]).requires_grad_(train) for x in self.inputs
        )

    @property
    def checked(self) -> list[int]:
        """The images that are checked: spread over the batch, with its first and its last."""
        batch = self.cell.batch
        count = min(batch, CHECKED_IMAGES if self.step is None and self.dy is not None
                    else CHECKED_IN_NETWORKS)  # fmt: skip
        return sorted({round(i * (batch - 1) / max(count - 1, 1)) for i in range(count)})

    def cotangent_of_checked(self) -> Tensor:
        """dy with zeros at the images that are not checked: then their gradients are zero too."""
        assert self.dy is not None
        kept = torch.zeros_like(self.dy)
        kept[self.checked] = self.dy[self.checked]
        return kept


class Formula(nn.Module):
    """A function of NHWC (or NCHW) activations and of parameters, as a module over NCHW."""

    def __init__(
        self, function: Callable[..., Tensor], inputs: Inputs, activations: int, nhwc: bool,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.function, self.nhwc = function, nhwc
        self.options = {**inputs.kwargs, **options}
        for name, tensor in list(inputs.tensors.items())[activations:]:
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor.detach()))
        self.names = list(inputs.tensors)[activations:]

    def forward(self, *activations: Tensor) -> Tensor:
        parameters = [getattr(self, name) for name in self.names]
        if not self.nhwc:
            return self.function(*activations, *parameters, **self.options)
        views = [x.permute(0, 2, 3, 1) for x in activations]
        return self.function(*views, *parameters, **self.options).permute(0, 3, 1, 2)


def build(cell: Cell) -> Work:
    """The work of a cell, seeded by its case."""
    return importlib.import_module(f"bench.{cell.subject}").build(cell)
