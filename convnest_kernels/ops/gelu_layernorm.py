"""gelu_layernorm: y = LN(GELU(x)) or GELU(LN(x))."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import Call
from ..reference import common
from ..reference.gelu_layernorm import gelu_layernorm as eager_gelu_layernorm
from . import _contract


def gelu_layernorm(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    *,
    eps: float = 1e-6,
    norm_first: bool = False,
    backend: str | None = None,
) -> Tensor:
    """GELU (exact erf form) and LayerNorm over the last axis, fused.

        y = LN(GELU(x)), or GELU(LN(x)) with norm_first

    The first norm of the ConvNeSt roadmap's `pre_activation` and (norm_first) `vanilla` designs.

    Args:
        x: [..., C], any strides; float32, bfloat16, float16 or float64.
        ln_weight: [C] or None for a norm without scale; in the dtype of x, or float32 beside
            bfloat16 and float16 activations.
        ln_bias: [C] or None, likewise.
        eps: added to the variance; statistics are float32 (float64 for float64).
        norm_first: normalize before the GELU.
        backend: "auto", "cuda", "triton", "cpu" or "eager"; None takes `use_backend`'s choice.

    Returns:
        y: the shape of x, contiguous, in the dtype of x (of autocast, where that is on).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, by name.
        BackendError: the backend asked for cannot run this call; it never falls back.
    """
    x = _contract.autocast("x", x)
    call = describe(x, ln_weight, ln_bias, eps=eps)
    backend = backends.requested(backend)
    inputs = (x, ln_weight, ln_bias)
    if _contract.runs_eager(call, backend):
        with _contract.without_autocast(x):
            return eager_gelu_layernorm(*inputs, eps=eps, norm_first=norm_first).contiguous()
    if _contract.wants_gradients(*inputs):
        return _GeluLayernorm.apply(*inputs, eps, norm_first, backend)
    return _contract.registered.gelu_layernorm_forward(*inputs, eps, norm_first, False, backend)[0]


def describe(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    *,
    eps: float = 1e-6,
    norm_first: bool = False,
) -> Call:
    """Check the arguments of `gelu_layernorm` and describe the call to the backends."""
    _contract.check_activation("x", x, "..., C")
    _contract.check_parameter("ln_weight", ln_weight, "[C]", x)
    _contract.check_parameter("ln_bias", ln_bias, "[C]", x)
    _contract.check_eps(eps, x)
    return _call(x)


def _call(x: Tensor) -> Call:
    shape = tuple(x.shape)
    return Call("gelu_layernorm", x.device.type, x.dtype, shape[-1], None, shape)


class _GeluLayernorm(torch.autograd.Function):
    """Keeps x and the row statistics."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, eps, norm_first, backend = args
        y, mean, rstd = _contract.registered.gelu_layernorm_forward(
            *inputs, eps, norm_first, True, backend
        )
        ctx.save_for_backward(*inputs, mean, rstd)
        ctx.options = eps, norm_first, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        *inputs, mean, rstd = ctx.saved_tensors
        eps, norm_first, backend = ctx.options
        needs = ctx.needs_input_grad[: len(inputs)]
        if _contract.differentiates_twice():
            grads = _contract.eager_gradients(
                eager_gelu_layernorm, inputs, dy, needs, eps=eps, norm_first=norm_first
            )
        else:
            x, *parameters = inputs
            grads = _contract.registered.gelu_layernorm_backward(
                dy, x, mean, rstd, *parameters, eps, norm_first, needs, backend
            )
            grads = _contract.needed(grads, needs)
        return *grads, None, None, None


def _forward(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    norm_first: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    if x.numel() == 0:
        return _outputs(x, keep)
    kernel = backends.implementation(_call(x), backend)
    return kernel.forward(x.contiguous(), ln_weight, ln_bias, eps, norm_first, keep)


def _outputs(x: Tensor, keep: bool) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *common.new_statistics(x, keep)


def _backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    norm_first: bool,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    inputs = (x, ln_weight, ln_bias)
    if x.numel() == 0:
        return _contract.zero_gradients(inputs, needs)
    kernel = backends.implementation(_call(x), backend)
    grads = kernel.backward(
        dy.contiguous(), x.contiguous(), mean, rstd, ln_weight, ln_bias, eps, norm_first, needs
    )
    return _contract.match_all(grads, inputs, needs)


_contract.register(
    "gelu_layernorm_forward(Tensor x, Tensor? ln_weight, Tensor? ln_bias, float eps, "
    "bool norm_first, bool keep, str backend) -> (Tensor y, Tensor mean, Tensor rstd)",
    _forward,
    lambda x, *args: _outputs(x, keep=args[-2]),
)
_contract.register(
    "gelu_layernorm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? ln_weight, "
    "Tensor? ln_bias, float eps, bool norm_first, bool[] needs, str backend) "
    "-> (Tensor dx, Tensor dln_weight, Tensor dln_bias)",
    _backward,
    lambda dy, x, mean, rstd, *args: _contract.fake_gradients((x, *args[:2]), args[-2]),
)
