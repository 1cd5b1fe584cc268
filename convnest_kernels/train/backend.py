"""Which backend a training run is on: the dispatch's own answer for the calls of the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from convnest_kernels import _extension
from convnest_kernels.backends import BackendError, Call, Explanation, explain_call
from convnest_kernels.modules import NestedBlock
from convnest_kernels.train.errors import UsageError
from convnest_kernels.train.loop import Trainer


@dataclass(frozen=True)
class Backend:
    """The backends that the model's blocks run on (one, as a rule)."""

    names: list[str]
    label: str
    reasons: dict[str, list[str]]  # against each backend that does not run

    @property
    def is_eager(self) -> bool:
        return self.names == ["eager"]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def describe_backend(trainer: Trainer) -> Backend:
    """Ask the dispatch about every block's wide operator.

    Raises UsageError if the backend that was asked for cannot run one, or has no such name.
    """
    asked = trainer.config.backend
    try:
        explanations = [explain_call(call, asked) for call in _calls(trainer)]
    except (BackendError, ValueError) as error:  # also of a wrong name in CONVNEST_BACKEND
        raise UsageError(str(error)) from error
    refused = [str(explanation) for explanation in explanations if explanation.backend is None]
    if refused:
        raise UsageError(f"--backend {asked}: {refused[0]}")
    names = sorted({explanation.backend or "" for explanation in explanations})
    return Backend(names, " + ".join(map(_label, names)), _reasons(explanations))


def _calls(trainer: Trainer) -> list[Call]:
    """What each block's wide operator is called with at full batch size."""
    calls: list[Call] = []

    def record(block: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(block, NestedBlock)
        n, _, h, w = inputs[0].shape
        shape = (n, h, w, block.wide_dim)
        device = torch.device(config.device).type
        calls.append(
            Call("nested_conv", device, config.dtype, block.wide_dim, block.kernel_size, shape)
        )

    config = trainer.config
    blocks = [m for m in trainer.model.modules() if isinstance(m, NestedBlock)]
    handles = [block.register_forward_pre_hook(record) for block in blocks]
    size = config.image_size
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trainer.model.eval()
            trainer.logits(torch.zeros(1, trainer.data.channels, size, size, device=config.device))
    finally:
        for handle in handles:
            handle.remove()
    return [call._replace(shape=(config.batch_size, *call.shape[1:])) for call in calls]


def _label(name: str) -> str:
    if name == "cpu" and _extension.module is not None:
        return f"cpu ({_extension.module.cpu.isa()})"
    return name


def _reasons(explanations: list[Explanation]) -> dict[str, list[str]]:
    used = {explanation.backend for explanation in explanations}
    reasons: dict[str, list[str]] = {}
    for explanation in explanations:
        for name, against in explanation.reasons.items():
            if name not in used and against:
                reasons.setdefault(name, []).extend(set(against) - set(reasons.get(name, [])))
    return reasons
