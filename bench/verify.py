"""No time without right numbers: every contender against the eager formula in float64.

The bound is that of the tests (tests/tolerances.py): twice the error that eager makes in the same
dtype on the same input, plus a derived floor. Peers may round elsewhere and get four times it, and
so does everyone in a whole network, whose layers compound their roundings.

What is timed is what is checked: a contender always runs its whole batch. Of a large batch, and of
a network's, some images are compared (`Work.checked`, with the first and the last): their outputs,
and their gradients, by a cotangent that is zero at the other images. So float64 takes those alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bench.training import labels
from bench.work import Work
from tests.tolerances import bound

SLACK_OF_PEERS = 4.0

Results = dict[str, Tensor]


class WrongNumbersError(RuntimeError):
    """A contender computes something else; nothing of it is timed."""


class ContiguousConvolutions(TorchFunctionMode):
    """Convolutions of contiguous tensors: float64 in channels_last takes 7 to 14 times as long."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.conv2d:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


def objective(work: Work, y: Tensor) -> Tensor:
    """A scalar of the checked images' outputs, whose gradients are those of the mode."""
    if work.step is None:
        return (y * work.cotangent_of_checked()[work.checked].to(y.dtype)).sum()
    wanted = labels(work.cell.batch, y.device)[work.checked]
    logits = y if y.dtype == torch.float64 else y.float()
    loss = nn.functional.cross_entropy(logits, wanted, label_smoothing=0.1, reduction="sum")
    return loss / work.cell.batch


def evaluate(work: Work, module: nn.Module, inputs: Sequence[Tensor]) -> Results:
    """A torch module on the checked images: outputs, in training gradients too."""
    xs = [x.detach()[work.checked] for x in inputs]
    if work.cell.mode == "infer":
        with torch.no_grad():
            return {"output": module(*xs)}
    wanted = {}
    if work.step is None:
        wanted = {f"dinput{i}": x.requires_grad_() for i, x in enumerate(xs)}
    wanted |= {f"d{name}": p for name, p in module.named_parameters()}
    y = module(*xs)
    grads = torch.autograd.grad(objective(work, y), list(wanted.values()))
    return {"output": y.detach(), **dict(zip(wanted, grads, strict=True))}


def of_checked(work: Work, name: str, result: Tensor) -> Tensor:
    """The checked images of a result that has all; a parameter's gradient as it is.

    Raises:
        WrongNumbersError: another image is not finite, or has a gradient that should be zero.
    """
    if name != "output" and not name.startswith("dinput"):
        return result
    if len(result) != work.cell.batch:
        raise WrongNumbersError(f"{name} has {len(result)} images, not {work.cell.batch}")
    others = result[sorted(set(range(work.cell.batch)) - set(work.checked))]
    if not others.isfinite().all():
        raise WrongNumbersError(f"{name} is not finite")
    if name != "output" and others.any():
        raise WrongNumbersError(f"{name} of an image without a cotangent is not zero")
    return result[work.checked]


class Checker:
    """Truth and bounds of one module, made once for all its contenders."""

    def __init__(self, work: Work, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        self.work = work
        self.module, self.inputs = module, inputs
        self._known: tuple[Results, dict[str, float]] | None = None

    def truth(self) -> tuple[Results, dict[str, float]]:
        if self._known is None:
            exact = copy.deepcopy(self.module).double()
            with ContiguousConvolutions():
                truth = evaluate(self.work, exact, [x.double() for x in self.inputs])
            eager = evaluate(self.work, self.module, self.inputs)
            shape = self.work.cell.shape
            rows = len(self.work.checked) * shape.height * shape.width
            bounds = {
                name: bound(
                    eager[name], truth[name], 1 if "put" in name else rows
                )
                for name in truth
            }  # fmt: skip
            self._known = truth, bounds
        return self._known

    def check(self, results: Results, ours: bool) -> float:
        """The largest error as a part of what is allowed.

        Raises:
            WrongNumbersError: it is above 1, something is missing, or not finite.
        """
        truth, bounds = self.truth()
        one_layer = self.work.dy is not None
        slack = 1.0 if ours and one_layer else SLACK_OF_PEERS
        worst = 0.0
        for name, whole in results.items():
            expected = truth[name]
            result = of_checked(self.work, name, whole)
            if result.shape != expected.shape:
                shapes = f"{list(result.shape)}, not {list(expected.shape)}"
                raise WrongNumbersError(f"{name} is {shapes}")
            error = (result.double() - expected).abs().max().item()
            allowed = slack * bounds[name]
            if not error <= allowed:  # NaN, too
                raise WrongNumbersError(f"{name} is off by {error:.3g}, allowed {allowed:.3g}")
            worst = max(worst, error / allowed)
        if not results or not math.isfinite(worst):
            raise WrongNumbersError("there is nothing to check")
        return worst
