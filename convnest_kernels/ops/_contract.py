"""What the operator stems share: registration, argument checks, autocast and eager composition.

A public function checks its arguments, casts the activation under autocast and then takes one of
three ways: the eager formula (asked for, or needed by a torch.func transform), the registered
operator under an autograd.Function, or the registered operator alone where no gradient is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import flop_counter

from .. import backends
from ..backends import BackendError, Call
from ..reference import common

# A copy that Hugging Face's `kernels` loads goes by a module name of its own (docs/adoption.md),
# and so do its operators: it lives beside an installed package, and beside other copies.
_MODULE = __name__.partition(".")[0]
NAMESPACE = "convnest" if _MODULE == "convnest_kernels" else _MODULE
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
registered = getattr(torch.ops, NAMESPACE)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `<namespace>::<schema>`: its fake, and the kernel for every device (it selects)."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


def register_conv_flops(operator: str) -> None:
    """Tell torch.utils.flop_counter what the taps of a depthwise operator cost.

    Two operations a tap; backward has two convolutions, of the input and of the weight. GELU and
    LayerNorm count nothing, as PyTorch counts them.
    """
    flop_counter.register_flop_formula(getattr(registered, f"{operator}_forward"))(
        lambda x, weight, *_, **__: _conv_flops(x, weight)
    )
    flop_counter.register_flop_formula(getattr(registered, f"{operator}_backward"))(
        lambda dy, x, kept, mean, rstd, weight, *_, **__: 2 * _conv_flops(x, weight)
    )


def _conv_flops(x_shape: Sequence[int], weight_shape: Sequence[int]) -> int:
    return 2 * math.prod(x_shape) * math.prod(weight_shape[2:])


# Checks. Each error names the argument, what was expected and what came.


def check_activation(name: str, x: Tensor, axes: str) -> None:
    """Check a channels-last activation, `axes` being its layout: "N, H, W, C" or "..., C"."""
    _check_tensor(name, x)
    if (axes == "N, H, W, C" and x.dim() != 4) or x.dim() == 0:
        raise ValueError(f"{name} must be [{axes}], got {list(x.shape)}")
    if x.dtype not in DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} must be one of {expected}, got {x.dtype}")
    if x.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one channel, got {list(x.shape)}")


def check_same(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Check that two activations agree in shape, dtype and device."""
    if x.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {list(other.shape)}, got {list(x.shape)}"
        )
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {x.dtype}")
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, got {x.device}")


def check_parameter(
    name: str, parameter: Tensor | None, shape: str, x: Tensor, channels: int | None = None
) -> None:
    """Check a per-channel vector or None; it may stay float32 beside a bf16 or fp16 activation.

    `shape` names the axis in the error, as in "[C]"; `channels` is that of x if not given.
    """
    if parameter is None:
        return
    _check_tensor(name, parameter)
    channels = x.shape[-1] if channels is None else channels
    if parameter.dim() != 1 or parameter.shape[0] != channels:
        raise ValueError(f"{name} must be {shape} = [{channels}], got {list(parameter.shape)}")
    _check_parameter_type(name, parameter, x)


def check_matrix(name: str, weight: Tensor, rows: int | str, columns: int, x: Tensor) -> int:
    """Check a linear layer's weight [rows, columns] and return its rows ("D" for any number)."""
    _check_tensor(name, weight)
    if (
        weight.dim() != 2
        or weight.shape[1] != columns
        or (not isinstance(rows, str) and weight.shape[0] != rows)
    ):
        raise ValueError(f"{name} must be [{rows}, {columns}], got {list(weight.shape)}")
    _check_parameter_type(name, weight, x)
    return weight.shape[0]


def check_conv_weight(name: str, weight: Tensor, x: Tensor, channels: int | None = None) -> None:
    """Check a depthwise weight [C, 1, k, k] with odd k; C is that of x if not given."""
    _check_tensor(name, weight)
    channels = x.shape[-1] if channels is None else channels
    if weight.dim() != 4 or weight.shape[0] != channels or weight.shape[1] != 1:
        raise ValueError(f"{name} must be [{channels}, 1, k, k], got {list(weight.shape)}")
    if weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        raise ValueError(
            f"{name} must have a square kernel of odd size, [{channels}, 1, k, k], "
            f"got {list(weight.shape)}"
        )
    _check_parameter_type(name, weight, x)


def _check_tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _check_parameter_type(name: str, parameter: Tensor, x: Tensor) -> None:
    if parameter.dtype not in (x.dtype, common.accumulate_dtype(x.dtype)):
        expected = f"{x.dtype}" if x.dtype.itemsize > 2 else f"{x.dtype} or torch.float32"
        raise TypeError(
            f"{name} must be {expected} beside {x.dtype} activations, got {parameter.dtype}"
        )
    if parameter.device != x.device:
        raise ValueError(
            f"{name} must be on {x.device} like the activation, got {parameter.device}"
        )


def check_eps(eps: float, x: Tensor) -> None:
    """Check that `eps` cannot vanish in the statistics' dtype: a constant row would give NaN."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a float, got {type(eps).__name__}")
    dtype = common.accumulate_dtype(x.dtype)
    smallest = torch.finfo(dtype).tiny
    if not smallest <= eps < math.inf:  # NaN too: it compares false
        raise ValueError(
            f"eps must be finite and at least {smallest:.3g} (statistics are {dtype}), got {eps!r}"
        )


# Ways through an operator.


def autocast(name: str, x: Tensor) -> Tensor:
    """Cast an activation to the autocast dtype, as autocast does: where it is on, not float64."""
    _check_tensor(name, x)
    device = x.device.type
    if x.dtype != torch.float64 and common.autocast_is_on(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Run the eager formula in the dtypes it is given."""
    device = x.device.type
    if common.autocast_is_on(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


@torch.compiler.assume_constant_result
def transform_is_active() -> bool:
    """Whether a torch.func transform or forward-mode AD is on."""
    # Dynamo runs this while it traces, inside the transform that it is tracing, and guards on the
    # transform stack by itself. `_current_level` is forward-mode AD's; -1 is outside of it.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def runs_eager(call: Call, requested: str) -> bool:
    """Whether the public function composes the eager formula in place of its registered operator.

    An autograd.Function cannot be seen through by torch.func transforms nor by forward-mode AD:
    there the eager formula is the right one, and any other backend by name an error.
    """
    if requested == "eager":
        return True
    if transform_is_active():
        if requested == "auto":
            return True
        raise BackendError(
            f"backend={requested!r} cannot run {call.operator} under a torch.func transform or "
            "forward-mode AD, which only 'eager' can see through; use backend='auto' or 'eager'"
        )
    if torch.compiler.is_compiling():
        return False  # the operator itself selects: nothing to trace, nothing to guard on
    return backends.select(call, requested) == "eager"


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of any of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def differentiates_twice() -> bool:
    """Inside a backward: whether its result will be differentiated again (create_graph=True).

    Compiled backwards never are: AOTAutograd refuses a double backward by itself.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def eager_gradients(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    dy: Tensor,
    needs: Sequence[bool],
    **options: Any,
) -> list[Tensor | None]:
    """The gradients through the eager formula `function`, which can be differentiated again."""
    with torch.enable_grad(), without_autocast(dy):
        # Views: where one input depends on another (t on x in a block), the gradients asked for
        # are the partial ones, not those through the other input's history.
        views = [None if x is None else x.view_as(x) for x in inputs]
        y = function(*views, **options)
        wanted = [x for x, need in zip(views, needs, strict=True) if need and x is not None]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(found) if need else None for need in needs]


# Gradients of a registered backward: one for each input, an empty tensor where none is needed.


def match(grad: Tensor, tensor: Tensor) -> Tensor:
    """Give a gradient the dtype and strides of what it belongs to."""
    if grad.dtype == tensor.dtype and grad.stride() == tensor.stride():
        return grad
    return torch.empty_like(tensor).copy_(grad)


def match_all(
    grads: Sequence[Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """`match` each needed gradient to its input; an empty tensor for the others."""
    activation = inputs[0]
    assert activation is not None
    return tuple(
        match(grad, x) if need and x is not None else activation.new_empty(0)
        for grad, x, need in zip(grads, inputs, needs, strict=True)
    )


def fake_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """What `match_all` returns, by shape, dtype and strides alone."""
    activation = inputs[0]
    assert activation is not None
    return tuple(
        torch.empty_like(x) if need and x is not None else activation.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )


def zero_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """The gradients of a call on an empty activation."""
    return tuple(grad.zero_() for grad in fake_gradients(inputs, needs))


def needed(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Turn the empty tensors of unneeded gradients into the None that autograd expects."""
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def kept(x: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised tensors for what backward needs: one like x, and the row statistics."""
    return x.new_empty(x.shape if keep else 0), *common.new_statistics(x, keep)
