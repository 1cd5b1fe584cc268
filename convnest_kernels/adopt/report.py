"""What `accelerate` did to a model, block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from ..backends import Call, Explanation, explain_call


@dataclass(frozen=True)
class Layer:
    """A block that runs on our operators."""

    name: str  # as in model.named_modules()
    kind: str  # library and class
    covers: str  # which of its layers ours take the place of
    operator: str
    module: nn.Module
    conv: nn.Conv2d
    requested: str | None  # backend; None follows `use_backend`
    undo: Callable[[], None] | None  # None where the block was so before

    def explain(self) -> Explanation:
        """Which backend the block gets where its weights are now, and why not the others."""
        return explain_call(call_of(self.operator, self.module, self.conv), self.requested)

    @property
    def backend(self) -> str | None:
        """Name of the backend the block gets where its weights are now; None if none runs it."""
        return self.explain().backend


def call_of(operator: str, module: nn.Module, conv: nn.Conv2d) -> Call:
    """Describe a block's call to the backends, on a map of one kernel's size."""
    # FSDP may have taken the weights from the convolution, for the time outside of forward.
    parameter = next(conv.parameters(), None)
    parameter = next(module.parameters()) if parameter is None else parameter
    size, channels = conv.kernel_size[0], conv.in_channels
    shape = (1, size, size, channels)
    return Call(operator, parameter.device.type, parameter.dtype, channels, size, shape)


@dataclass(frozen=True)
class Skipped:
    """A layer that stays as it was."""

    name: str
    kind: str
    reason: str
    expected: bool  # True where no operator covers such a layer; strict=True lets that pass


@dataclass
class Report:
    """What was replaced, what was skipped and why; `undo` puts everything back.

    `replaced` are the blocks that this call of `accelerate` changed, `already` those that were so
    before, and `skipped` what it left alone: blocks with the reason, and layers that no operator
    covers, such as a LayerNorm by itself. `print(report)` shows all of it.
    """

    replaced: list[Layer] = field(default_factory=list)
    already: list[Layer] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def undo(self) -> None:
        """Give every replaced block its own forward again; a second call does nothing.

        Parameters, buffers and hooks were never touched. Copies of the model that were made in
        between keep our operators.
        """
        while self.replaced:
            layer = self.replaced.pop()
            assert layer.undo is not None
            layer.undo()

    def __str__(self) -> str:
        counts = len(self.replaced), len(self.already), len(self.skipped)
        lines = ["{} replaced, {} already, {} skipped".format(*counts)]
        for title, layers in (("replaced", self.replaced), ("already", self.already)):
            for layer in layers:
                backend = layer.backend or f"no backend\n{layer.explain()}"
                lines.append(_line(title, layer.name, layer.kind, layer.covers, backend))
        for each in self.skipped:
            lines.append(_line("skipped", each.name, each.kind, each.reason))
        return "\n".join(lines)


def _line(title: str, name: str, *rest: str) -> str:
    return f"  {title:8} {name or '(the model itself)'}: {'; '.join(rest)}"
