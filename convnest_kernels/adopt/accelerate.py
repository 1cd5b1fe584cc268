"""Find the ConvNeXt and ConvNeSt blocks of a model and run them on our operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.fx
from torch import nn

from .. import backends
from ..backends import BackendError, explain_call
from ..modules import NestedBlock
from . import fused
from .families import Family, family_of
from .fused import FusedBlock, State
from .report import Layer, Report, Skipped, call_of

_OPERATOR = "dwconv_gelu_layernorm"
_COVERS = "convolution + norm, linear + GELU + linear"


class AccelerateError(RuntimeError):
    """With strict=True: not every block could be replaced, or there was none."""


def accelerate(model: nn.Module, *, backend: str = "auto", strict: bool = False) -> Report:
    """Run the ConvNeXt and ConvNeSt blocks inside `model` on our operators, in place.

    Blocks of timm, torchvision and transformers (ConvNeXt, ConvNeXt V2, DINOv3's ConvNeXt) compute
    LN(DW(x)) with `ops.dwconv_gelu_layernorm`, and keep one wide tensor in place of two for the
    backward of GELU and the linear layer after it. Of a `NestedBlock` the backend is set. Nothing
    else is changed: each block stays the object it was, with its parameters, buffers, hooks,
    submodules and state_dict keys. Results are those of before up to rounding.

    Where ours would not be the same computation in some call (a hook on the convolution or the
    norm, a layer changed since, a tensor subclass such as DTensor), the library's forward runs.

    Args:
        model: any module; wrapped by DDP, FSDP or torch.compile is fine, and so is wrapping it
            after. A model that torch.fx or TorchScript has taken apart has no blocks left:
            accelerate first. TorchScript cannot script an accelerated model; torch.fx can trace
            it.
        backend: as in `ops`: "auto" follows `use_backend` and skips blocks that only "eager" could
            run; a backend by name never falls back.
        strict: raise if a block had to be skipped, or if there is none.

    Returns:
        Report: `print(report)` says what was replaced, what was skipped and why; `report.undo()`
        puts everything back. A second call changes nothing.

    Raises:
        TypeError, ValueError: a `model` that is no module, an unknown `backend`.
        BackendError: the backend asked for cannot run a block where its weights are now.
        AccelerateError: with strict=True. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    requested = None if backends.check_name(backend) == "auto" else backend
    report, changes = _plan(model, requested)
    if strict:
        _refuse(report)
    for change in changes:
        change()
    return report


def _plan(model: nn.Module, requested: str | None) -> tuple[Report, list[Callable[[], None]]]:
    """What `accelerate` will do; nothing is changed yet."""
    report, changes = Report(), []
    for name, module in _outermost(model):
        if isinstance(module, NestedBlock):
            layer, change = _plan_nested(name, module, requested)
        elif (family := family_of(module)) is not None:
            reason = _reason_against(family, module, requested)
            if reason is not None:
                report.skipped.append(Skipped(name, family.kind, reason, expected=False))
                continue
            layer, change = _plan_block(name, module, family, requested)
        else:
            if (skipped := _skip(name, module)) is not None:
                report.skipped.append(skipped)
            continue
        if requested is not None and layer.backend is None:
            raise BackendError(f"{name or 'the model'} cannot be accelerated:\n{layer.explain()}")
        (report.already if layer.undo is None else report.replaced).append(layer)
        changes.append(change)
    return report, changes


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules but those inside of a block."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, NestedBlock) or family_of(module) is not None:
            inside.update(module.modules())
        yield name, module


def _plan_nested(
    name: str, block: NestedBlock, requested: str | None
) -> tuple[Layer, Callable[[], None]]:
    before = block.backend

    def change() -> None:
        block.backend = requested

    def undo() -> None:
        block.backend = before

    layer = Layer(
        name,
        "ConvNeSt NestedBlock",
        "the block",
        "nested_conv",
        block,
        block.conv_dw,
        requested,
        None if before == requested else undo,
    )
    return layer, change


def _plan_block(
    name: str, block: nn.Module, family: Family, requested: str | None
) -> tuple[Layer, Callable[[], None]]:
    state: State | None = getattr(block, "convnest", None)

    def change() -> None:
        fused.swap(block, State(family.kind, requested))

    def undo() -> None:
        if state is None:
            fused.put_back(block)
        else:
            fused.swap(block, state)

    layer = Layer(
        name,
        family.kind,
        _COVERS,
        _OPERATOR,
        block,
        family.parts(block).conv,
        requested,
        None if state is not None and state.backend == requested else undo,
    )
    return layer, change


def _reason_against(family: Family, block: nn.Module, requested: str | None) -> str | None:
    known = family.loaded()
    assert known is not None
    # Through our own class and FSDP2's, which both leave the library's forward below them.
    forwards = [cls.__dict__["forward"] for cls in type(block).__mro__ if "forward" in vars(cls)]
    if forwards[0] is FusedBlock.__dict__["forward"]:
        forwards = forwards[1:]
    if forwards[0] is not known.__dict__["forward"]:
        return f"{type(block).__name__} has a forward of its own"
    if "forward" in block.__dict__:
        return "its forward was replaced on the object"
    names = set(known.forward.__code__.co_names)
    if names != family.names:
        differ = ", ".join(sorted(names ^ family.names))
        return f"the forward of this version of {family.library} is not known (about {differ})"
    try:
        parts = family.parts(block)
    except (AttributeError, ValueError) as error:
        return f"it is not built as {family.kind} is ({error})"
    if (reason := fused.reason_against(family, parts, block)) is not None:
        return reason
    if next(block.parameters(), None) is None:
        return "its parameters are elsewhere (FSDP with use_orig_params=False?)"
    explanation = explain_call(call_of(_OPERATOR, block, parts.conv), requested)
    if requested is None and explanation.backend == "eager" and backends.requested(None) == "auto":
        others = (f"{name}: {'; '.join(reasons)}" for name, reasons in explanation.reasons.items())
        return f"only 'eager' could run it, and that is no faster ({' | '.join(others)})"
    return None


def _skip(name: str, module: nn.Module) -> Skipped | None:
    """What to say of a layer outside of the blocks; None for what is not ours to speed up."""
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        if name and "." in name:
            return None
        return Skipped(name, kind, "TorchScript: accelerate cannot look inside", expected=False)
    if isinstance(module, torch.fx.GraphModule):
        return Skipped(name, kind, "torch.fx took it apart: accelerate before tracing", False)
    if isinstance(module, nn.LayerNorm):
        return Skipped(name, kind, "no operator covers a LayerNorm by itself", expected=True)
    if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
        return Skipped(name, kind, "a depthwise convolution in no block that is known", False)
    return None


def _refuse(report: Report) -> None:
    missed = [each for each in report.skipped if not each.expected]
    if missed:
        lines = "\n".join(f"  {each.name}: {each.kind}, {each.reason}" for each in missed)
        raise AccelerateError(f"strict=True, and these cannot be replaced:\n{lines}")
    if not report.replaced and not report.already:
        raise AccelerateError(
            "strict=True, and the model has no ConvNeXt block of timm, torchvision or "
            "transformers, and no NestedBlock"
        )
