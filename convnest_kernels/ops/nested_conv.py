"""nested_conv: v = GELU(g + DW(LN(g)) + b), g = GELU(h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import Call
from ..reference.nested_conv import nested_conv as eager_nested_conv
from . import _contract


def nested_conv(
    h: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    *,
    eps: float = 1e-6,
    shortcut: bool = True,
    backend: str | None = None,
) -> Tensor:
    """The wide half of a ConvNeSt block, fused: GELU, LayerNorm, depthwise k×k, shortcut, GELU.

        g = GELU(h);  z = LN(g);  u = g + DW(z) + conv_bias;  v = GELU(u)

    GELU is the exact erf form, LN runs over the channels, and zero padding is of z, after the norm.
    (The inner shortcut of the paper's section on the nested design; post_norm leaves it out.)

    Args:
        h: [N, H, W, C], any strides; float32, bfloat16, float16 or float64.
        conv_weight: [C, 1, k, k], k odd, as nn.Conv2d holds it; in the dtype of h, or float32
            beside bfloat16 and float16 activations. So are all the parameters.
        conv_bias: [C] or None.
        ln_weight: [C] or None for a norm without scale.
        ln_bias: [C] or None.
        eps: added to the variance; statistics are float32 (float64 for float64).
        shortcut: add g to u.
        backend: "auto", "cuda", "triton", "cpu" or "eager"; None takes `use_backend`'s choice.

    Returns:
        v: [N, H, W, C], contiguous, in the dtype of h (of autocast, where that is on).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, by name.
        BackendError: the backend asked for cannot run this call; it never falls back.
    """
    h = _contract.autocast("h", h)
    call = describe(h, conv_weight, conv_bias, ln_weight, ln_bias, eps=eps)
    backend = backends.requested(backend)
    inputs = (h, conv_weight, conv_bias, ln_weight, ln_bias)
    if _contract.runs_eager(call, backend):
        with _contract.without_autocast(h):
            return eager_nested_conv(*inputs, eps=eps, shortcut=shortcut).contiguous()
    if _contract.wants_gradients(*inputs):
        return _NestedConv.apply(*inputs, eps, shortcut, backend)
    return _contract.registered.nested_conv_forward(*inputs, eps, shortcut, False, backend)[0]


def describe(
    h: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    *,
    eps: float = 1e-6,
    shortcut: bool = True,
) -> Call:
    """Check the arguments of `nested_conv` and describe the call to the backends."""
    _contract.check_activation("h", h, "N, H, W, C")
    _contract.check_conv_weight("conv_weight", conv_weight, h)
    _contract.check_parameter("conv_bias", conv_bias, "[C]", h)
    _contract.check_parameter("ln_weight", ln_weight, "[C]", h)
    _contract.check_parameter("ln_bias", ln_bias, "[C]", h)
    _contract.check_eps(eps, h)
    return _call(h, conv_weight)


def _call(h: Tensor, conv_weight: Tensor) -> Call:
    shape = tuple(h.shape)
    return Call("nested_conv", h.device.type, h.dtype, shape[-1], conv_weight.shape[2], shape)


class _NestedConv(torch.autograd.Function):
    """Keeps h and u of the wide tensors, and the row statistics."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, eps, shortcut, backend = args
        v, u, mean, rstd = _contract.registered.nested_conv_forward(
            *inputs, eps, shortcut, True, backend
        )
        ctx.save_for_backward(*inputs, u, mean, rstd)
        ctx.options = eps, shortcut, backend
        return v

    @staticmethod
    def backward(ctx: Any, dv: Tensor) -> Any:
        *inputs, u, mean, rstd = ctx.saved_tensors
        eps, shortcut, backend = ctx.options
        needs = ctx.needs_input_grad[: len(inputs)]
        if _contract.differentiates_twice():
            grads = _contract.eager_gradients(
                eager_nested_conv, inputs, dv, needs, eps=eps, shortcut=shortcut
            )
        else:
            h, *parameters = inputs
            grads = _contract.registered.nested_conv_backward(
                dv, h, u, mean, rstd, *parameters, eps, shortcut, needs, backend
            )
            grads = _contract.needed(grads, needs)
        return *grads, None, None, None


def _forward(
    h: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    shortcut: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    if h.numel() == 0:
        return _outputs(h, keep)
    kernel = backends.implementation(_call(h, conv_weight), backend)
    parameters = (conv_weight, conv_bias, ln_weight, ln_bias)
    return kernel.forward(h.contiguous(), *parameters, eps, shortcut, keep)


def _outputs(h: Tensor, keep: bool) -> tuple[Tensor, ...]:
    return h.new_empty(h.shape), *_contract.kept(h, keep)


def _backward(
    dv: Tensor,
    h: Tensor,
    u: Tensor,
    mean: Tensor,
    rstd: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    shortcut: bool,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    inputs = (h, conv_weight, conv_bias, ln_weight, ln_bias)
    if h.numel() == 0:
        return _contract.zero_gradients(inputs, needs)
    kernel = backends.implementation(_call(h, conv_weight), backend)
    grads = kernel.backward(
        dv.contiguous(), h.contiguous(), u, mean, rstd, *inputs[1:], eps, shortcut, needs
    )
    return _contract.match_all(grads, inputs, needs)


_contract.register(
    "nested_conv_forward(Tensor h, Tensor conv_weight, Tensor? conv_bias, Tensor? ln_weight, "
    "Tensor? ln_bias, float eps, bool shortcut, bool keep, str backend) "
    "-> (Tensor v, Tensor u, Tensor mean, Tensor rstd)",
    _forward,
    lambda h, *args: _outputs(h, keep=args[-2]),
)
_contract.register(
    "nested_conv_backward(Tensor dv, Tensor h, Tensor u, Tensor mean, Tensor rstd, "
    "Tensor conv_weight, Tensor? conv_bias, Tensor? ln_weight, Tensor? ln_bias, float eps, "
    "bool shortcut, bool[] needs, str backend) "
    "-> (Tensor dh, Tensor dconv_weight, Tensor dconv_bias, Tensor dln_weight, Tensor dln_bias)",
    _backward,
    lambda dv, h, u, mean, rstd, *args: _contract.fake_gradients((h, *args[:4]), args[-2]),
)
_contract.register_conv_flops("nested_conv")
