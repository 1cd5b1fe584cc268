"""No time without right numbers: every contender against the eager formula in float64.

The bound is that of the tests (tests/tolerances.py): twice the error that eager makes in the same
dtype on the same input, plus a derived floor. Peers may round elsewhere and get four times it, and
so does everyone in a whole network, whose layers compound their roundings.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.training import labels
from bench.work import Work
from tests.tolerances import bound

CHUNK = 8  # images at a time in float64
SLACK_OF_PEERS = 4.0

Results = dict[str, Tensor]


class WrongNumbersError(RuntimeError):
    """A contender computes something else; nothing of it is timed."""


def objective(work: Work, y: Tensor, start: int) -> Tensor:
    """A scalar whose gradients are those of the mode, of images from `start` on."""
    if work.step is None:
        assert work.dy is not None
        return (y * work.dy[start : start + len(y)].to(y.dtype)).sum()
    wanted = labels(work.cell.batch, y.device)[start : start + len(y)]
    loss = nn.functional.cross_entropy(
        y if y.dtype == torch.float64 else y.float(), wanted, label_smoothing=0.1, reduction="sum"
    )
    return loss / work.cell.batch


def evaluate(work: Work, module: nn.Module, inputs: Sequence[Tensor], chunk: int) -> Results:
    """Outputs of a torch module; in training the gradients of inputs and parameters too."""
    outputs, sums = [], {}
    wrt_inputs: dict[str, list[Tensor]] = {}
    for start in range(0, work.cell.batch, chunk):
        xs = [x.detach()[start : start + chunk] for x in inputs]
        if work.cell.mode == "infer":
            with torch.no_grad():
                outputs.append(module(*xs))
            continue
        if work.step is None:
            xs = [x.requires_grad_() for x in xs]
        y = module(*xs)
        outputs.append(y.detach())
        names, parameters = zip(*module.named_parameters(), strict=True)
        wanted = [x for x in xs if x.requires_grad]
        grads = torch.autograd.grad(objective(work, y, start), [*wanted, *parameters])
        for i, grad in enumerate(grads[: len(wanted)]):
            wrt_inputs.setdefault(f"dinput{i}", []).append(grad)
        for name, grad in zip(names, grads[len(wanted) :], strict=True):
            sums[f"d{name}"] = sums[f"d{name}"] + grad if f"d{name}" in sums else grad
    whole = {name: torch.cat(parts) for name, parts in wrt_inputs.items()}
    return {"output": torch.cat(outputs), **whole, **sums}


class Checker:
    """Truth and bounds of one module, made once for all its contenders."""

    def __init__(self, work: Work, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        self.work = work
        self.module, self.inputs = module, inputs
        self._known: tuple[Results, dict[str, float]] | None = None

    def truth(self) -> tuple[Results, dict[str, float]]:
        if self._known is None:
            exact = copy.deepcopy(self.module).double()
            truth = evaluate(self.work, exact, [x.double() for x in self.inputs], CHUNK)
            eager = evaluate(self.work, self.module, self.inputs, self.work.cell.batch)
            shape = self.work.cell.shape
            rows = self.work.cell.batch * shape.height * shape.width
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
        for name, result in results.items():
            expected = truth[name]
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
