"""layernorm_residual: y = s ⊙ x + LN(t)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import Call
from ..reference import common
from ..reference.layernorm_residual import (
    layernorm_residual as eager_layernorm_residual,
)
from . import _contract


def layernorm_residual(
    t: Tensor,
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    scale: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm over the last axis and the scaled outer shortcut, fused.

        y = scale ⊙ x + LN(t)

    The end of a ConvNeSt block; `scale` is ResScale (as in the MetaFormer baselines).

    Args:
        t: [..., C], any strides; float32, bfloat16, float16 or float64.
        x: like t in shape, dtype and device.
        ln_weight: [C] or None for a norm without scale; in the dtype of t, or float32 beside
            bfloat16 and float16 activations. So are all the parameters.
        ln_bias: [C] or None.
        scale: [C], or None for 1.
        eps: added to the variance; statistics are float32 (float64 for float64).
        backend: "auto", "cuda", "triton", "cpu" or "eager"; None takes `use_backend`'s choice.

    Returns:
        y: the shape of t, contiguous, in the dtype of t (of autocast, where that is on).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, by name.
        BackendError: the backend asked for cannot run this call; it never falls back.
    """
    t, x = _contract.autocast("t", t), _contract.autocast("x", x)
    call = describe(t, x, ln_weight, ln_bias, scale, eps=eps)
    backend = backends.requested(backend)
    inputs = (t, x, ln_weight, ln_bias, scale)
    if _contract.runs_eager(call, backend):
        with _contract.without_autocast(t):
            return eager_layernorm_residual(*inputs, eps=eps).contiguous()
    if _contract.wants_gradients(*inputs):
        return _LayernormResidual.apply(*inputs, eps, backend)
    return _contract.registered.layernorm_residual_forward(*inputs, eps, False, backend)[0]


def describe(
    t: Tensor,
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    scale: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Call:
    """Check the arguments of `layernorm_residual` and describe the call to the backends."""
    _contract.check_activation("t", t, "..., C")
    _contract.check_activation("x", x, "..., C")
    _contract.check_same("x", x, "t", t)
    _contract.check_parameter("ln_weight", ln_weight, "[C]", t)
    _contract.check_parameter("ln_bias", ln_bias, "[C]", t)
    _contract.check_parameter("scale", scale, "[C]", t)
    _contract.check_eps(eps, t)
    return _call(t)


def _call(t: Tensor) -> Call:
    shape = tuple(t.shape)
    return Call("layernorm_residual", t.device.type, t.dtype, shape[-1], None, shape)


class _LayernormResidual(torch.autograd.Function):
    """Keeps t, x where scale wants a gradient, and the row statistics."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, eps, backend = args
        y, mean, rstd = _contract.registered.layernorm_residual_forward(*inputs, eps, True, backend)
        ctx.save_for_backward(*inputs, mean, rstd)
        ctx.options = eps, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        *inputs, mean, rstd = ctx.saved_tensors
        eps, backend = ctx.options
        needs = ctx.needs_input_grad[: len(inputs)]
        if _contract.differentiates_twice():
            grads = _contract.eager_gradients(eager_layernorm_residual, inputs, dy, needs, eps=eps)
        else:
            t, x, *parameters = inputs
            grads = _contract.registered.layernorm_residual_backward(
                dy, t, x, mean, rstd, *parameters, eps, needs, backend
            )
            grads = _contract.needed(grads, needs)
        return *grads, None, None


def _forward(
    t: Tensor,
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    keep: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    if t.numel() == 0:
        return _outputs(t, keep)
    kernel = backends.implementation(_call(t), backend)
    return kernel.forward(t.contiguous(), x.contiguous(), ln_weight, ln_bias, scale, eps, keep)


def _outputs(t: Tensor, keep: bool) -> tuple[Tensor, ...]:
    return t.new_empty(t.shape), *common.new_statistics(t, keep)


def _backward(
    dy: Tensor,
    t: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    inputs = (t, x, ln_weight, ln_bias, scale)
    if t.numel() == 0:
        return _contract.zero_gradients(inputs, needs)
    kernel = backends.implementation(_call(t), backend)
    grads = kernel.backward(
        dy.contiguous(), t.contiguous(), x.contiguous(), mean, rstd, *inputs[2:], eps, needs
    )
    return _contract.match_all(grads, inputs, needs)


_contract.register(
    "layernorm_residual_forward(Tensor t, Tensor x, Tensor? ln_weight, Tensor? ln_bias, "
    "Tensor? scale, float eps, bool keep, str backend) "
    "-> (Tensor y, Tensor mean, Tensor rstd)",
    _forward,
    lambda t, *args: _outputs(t, keep=args[-2]),
)
_contract.register(
    "layernorm_residual_backward(Tensor dy, Tensor t, Tensor x, Tensor mean, Tensor rstd, "
    "Tensor? ln_weight, Tensor? ln_bias, Tensor? scale, float eps, bool[] needs, str backend) "
    "-> (Tensor dt, Tensor dx, Tensor dln_weight, Tensor dln_bias, Tensor dscale)",
    _backward,
    lambda dy, t, x, mean, rstd, *args: _contract.fake_gradients((t, x, *args[:3]), args[-2]),
)
