"""The class a swapped block gets: the library's own, with a forward over our operators in front.

The block stays the object it was, so that its parameters, buffers, submodules, hooks and names are
untouched, and isinstance holds. What is different is the type's forward. It steps aside, for one
call, wherever ours would not be the same computation: a hook on a layer that would not run, a
layer that was changed since, a tensor subclass. The library's forward then runs as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import ops
from ..ops import _contract
from ..reference import common
from .families import FAMILIES, Family, Parts
from .gelu_linear import gelu_linear
from .matmul import differentiable_linear

KERNEL_SIZES = (3, 5, 7, 9, 11, 13)
FAMILY = {family.kind: family for family in FAMILIES}
_GELUS = {
    ("torch.nn.modules.activation", "GELU"),
    ("timm.layers.activations", "GELU"),
    ("transformers.activations", "GELUActivation"),
}


@dataclass
class State:
    """What a swapped block knows, in its __dict__ and so in its copies and pickles."""

    kind: str
    backend: str | None  # None follows `use_backend`


class FusedBlock(nn.Module):
    """In front of a library's block in the type's order of resolution."""

    convnest: State | None  # None: the block is as it was

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.convnest
        if state is None or len(args) != 1 or kwargs:
            return super().forward(*args, **kwargs)
        y = run(FAMILY[state.kind], self, args[0], state.backend)
        return super().forward(*args) if y is None else y

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The type is made at run time: a pickle holds the library's class in its place.
        reduced: Any = object.__reduce_ex__(self, 2)
        return (_rebuild, (original_class(type(self)),), *reduced[2:])


def _rebuild(original: type[nn.Module]) -> nn.Module:
    return original.__new__(fused_class(original))


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def fused_class(original: type[nn.Module]) -> type[nn.Module]:
    """The library's class with our forward in front, under the same name; one for each class."""
    if original in _CLASSES:
        return _CLASSES[original]
    same = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    _CLASSES[original] = type(original.__name__, (FusedBlock, original), same)
    return _CLASSES[original]


def original_class(fused: type[nn.Module]) -> type[nn.Module]:
    """The class that `fused_class` made `fused` of."""
    return fused.__mro__[2]


def swap(block: nn.Module, state: State) -> None:
    """Put our forward in front of the block's."""
    block.convnest = state  # type: ignore[assignment]
    if not isinstance(block, FusedBlock):
        block.__class__ = fused_class(type(block))


def put_back(block: nn.Module) -> None:
    """Take our forward away again."""
    if type(block).__mro__[1] is FusedBlock:
        block.__class__ = original_class(type(block))
        del block.convnest
    else:
        # FSDP2 put a class of its own in front since: ours stays below it and passes through.
        block.convnest = None  # type: ignore[assignment]


def run(family: Family, block: nn.Module, x: Any, backend: str | None) -> Any:
    """The block over our operators; None where that is not the library's computation, now."""
    parts = family.parts(block)
    traced = isinstance(x, torch.fx.Proxy)
    if not _can_run(family, parts, block, x, traced):
        return None
    z = conv_norm(
        x,
        parts.conv.weight,
        parts.conv.bias,
        parts.norm.weight,
        parts.norm.bias,
        parts.norm.eps,
        backend,
    )
    if not traced and _gelu_linear_is_plain(parts):
        t = gelu_linear(_first_linear(parts.fc1, z), parts.fc2.weight, parts.fc2.bias)
    else:
        t = family.pointwise(block, z)
    return family.join(block, t, x)


def conv_norm(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    backend: str | None,
) -> Tensor:
    """LN(DW(x)) of [N, C, H, W], as [N, H, W, C]. One node to a torch.fx trace."""
    return ops.dwconv_gelu_layernorm(
        x.permute(0, 2, 3, 1),
        conv_weight,
        conv_bias,
        ln_weight,
        ln_bias,
        eps=eps,
        activation="none",
        backend=backend,
    )


torch.fx.wrap("conv_norm")


def reason_against(family: Family, parts: Parts, block: nn.Module) -> str | None:
    """Why a block's convolution and norm cannot be ours, by what they are; None if they can."""
    conv, norm = parts.conv, parts.norm
    if type(conv) is not nn.Conv2d:
        return f"its convolution is a {type(conv).__name__}, not an nn.Conv2d"
    channels = conv.in_channels
    if conv.groups != channels or conv.out_channels != channels:
        return f"its convolution is not depthwise ({conv})"
    size = conv.kernel_size[0]
    if conv.kernel_size != (size, size) or size not in KERNEL_SIZES:
        return f"its kernel is {conv.kernel_size}; kernels are square, of size 3 to 13 and odd"
    if conv.stride != (1, 1) or conv.dilation != (1, 1):
        return f"its convolution has stride {conv.stride} and dilation {conv.dilation}"
    if conv.padding not in ((size // 2, size // 2), "same") or conv.padding_mode != "zeros":
        return f"its padding is {conv.padding}, {conv.padding_mode}, which changes the map"
    named = type(norm).__module__, type(norm).__name__
    if named not in family.norms or not isinstance(norm, nn.LayerNorm):
        return f"its norm is a {type(norm).__name__}, not a LayerNorm over the channels"
    if norm.normalized_shape != (channels,):
        return f"its norm is over {norm.normalized_shape}, not over {channels} channels"
    if getattr(norm, "data_format", "channels_last") != "channels_last":
        return f"its norm takes {norm.data_format} inside of a channels-last block"
    if norm.eps < torch.finfo(torch.float32).tiny:
        return f"its norm's eps is {norm.eps}, and a constant row would give NaN"
    return None


def _can_run(family: Family, parts: Parts, block: nn.Module, x: Any, traced: bool) -> bool:
    """Whether our forward is the library's, in this call."""
    if reason_against(family, parts, block) is not None:
        return False
    if _any_hook(parts.conv, parts.norm, *parts.around):
        return False
    if traced:
        return True
    weight = parts.conv.weight
    parameters = [
        p for p in (weight, parts.conv.bias, parts.norm.weight, parts.norm.bias) if p is not None
    ]
    if any(is_traceable_wrapper_subclass(p) or p.device != x.device for p in (x, *parameters)):
        return False
    if x.dim() != 4 or x.shape[1] != parts.conv.in_channels or x.dtype not in _contract.DTYPES:
        return False
    if common.autocast_is_on(x.device.type):
        # Autocast leaves float64 alone, and then the library's own error is the right answer.
        return all(p.dtype == x.dtype for p in parameters) or torch.float64 not in {
            x.dtype,
            *(p.dtype for p in parameters),
        }
    wide = common.accumulate_dtype(x.dtype)
    return weight.dtype == x.dtype and all(p.dtype in (x.dtype, wide) for p in parameters)


def _first_linear(fc1: Any, z: Tensor) -> Tensor:
    """The first linear layer, which may be of any class and have hooks."""
    if type(fc1) is nn.Linear and not _any_hook(fc1) and _is_plain(fc1.weight):
        return differentiable_linear(z, fc1.weight, fc1.bias)
    return fc1(z)


def _is_plain(weight: Tensor) -> bool:
    return not is_traceable_wrapper_subclass(weight)


def _gelu_linear_is_plain(parts: Parts) -> bool:
    """Whether the end of the pointwise half is GELU and a linear layer and nothing else."""
    act, fc2 = parts.act, parts.fc2
    return (
        type(fc2) is nn.Linear
        and (type(act).__module__, type(act).__name__) in _GELUS
        and getattr(act, "approximate", "none") == "none"
        and getattr(act, "act", nn.functional.gelu) is nn.functional.gelu
        and _is_plain(fc2.weight)
        and all(_does_nothing(module) for module in parts.inside)
        and not _any_hook(act, fc2, *parts.inside)
    )


def _does_nothing(module: nn.Module) -> bool:
    if type(module) is nn.Dropout:
        return module.p == 0 or not module.training
    # timm's Mlp is the container of the others.
    named = type(module).__module__, type(module).__name__
    return type(module) is nn.Identity or named == ("timm.layers.mlp", "Mlp")


def _any_hook(*modules: nn.Module) -> bool:
    """Whether a hook waits on any of these modules, or on all modules."""
    return module_hooks._has_any_global_hook() or any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
    )
