"""A torch module as a contender: the call to time and the results to check, in each mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench import verify
from bench.runtimes import Prepared
from bench.work import Work


def copies_for(device: str) -> int:
    """Copies of the inputs that calls take in turn: on a GPU none is left in a cache."""
    return 3 if device == "cuda" else 1


def run_torch(
    work: Work, form: str, module: nn.Module, function: Any = None, **scope: Any
) -> Prepared:
    """A torch module (called through `function`, where it is compiled) as a contender."""
    function = module if function is None else function
    if work.step is not None:
        return _run_steps(work, form, module, function, **scope)
    first, *others = (
        _run_on(work, work.inputs_for(form), module, function)
        for _ in range(copies_for(work.cell.device))
    )
    return Prepared(
        first.call,
        first.results,
        module,
        first.forward,
        others=tuple(other.call for other in others),
        **scope,
    )


def _run_on(work: Work, inputs: tuple[Tensor, ...], module: nn.Module, function: Any) -> Prepared:
    def forward() -> Tensor:
        return function(*inputs)

    if work.cell.mode == "infer":

        def infer() -> Tensor:
            with torch.no_grad():
                return forward()

        return Prepared(infer, lambda: {"output": infer()}, module, forward)

    parameters = dict(module.named_parameters())
    wanted = [*inputs, *parameters.values()]
    names = [f"dinput{i}" for i in range(len(inputs))] + [f"d{name}" for name in parameters]

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), wanted, work.dy)

    def results() -> dict[str, Tensor]:
        y = forward()
        grads = torch.autograd.grad(y, wanted, work.cotangent_of_checked())
        return {"output": y.detach(), **dict(zip(names, grads, strict=True))}

    return Prepared(train, results, module, forward)


def _run_steps(work: Work, form: str, module: nn.Module, function: Any, **scope: Any) -> Prepared:
    """Whole training steps are timed; logits and gradients before the first one are checked."""
    assert work.step is not None
    inputs = work.inputs_for(form)
    parameters = dict(module.named_parameters())

    def forward() -> Tensor:
        return function(*inputs)

    def results() -> dict[str, Tensor]:
        y = forward()
        loss = verify.objective(work, y[work.checked])
        grads = torch.autograd.grad(loss, list(parameters.values()))
        names = [f"d{name}" for name in parameters]
        return {"output": y.detach(), **dict(zip(names, grads, strict=True))}

    return Prepared(work.step(function, inputs), results, module, forward, **scope)
