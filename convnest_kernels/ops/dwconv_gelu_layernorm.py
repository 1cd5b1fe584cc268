"""dwconv_gelu_layernorm: y = LN(act(c)) or act(LN(c)), c = DW(x) + b."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import Call
from ..reference.dwconv_gelu_layernorm import (
    dwconv_gelu_layernorm as eager_dwconv_gelu_layernorm,
)
from . import _contract

ACTIVATIONS = ("gelu", "none")


def dwconv_gelu_layernorm(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    *,
    eps: float = 1e-6,
    activation: str = "gelu",
    norm_first: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Depthwise k×k, activation and channels-last LayerNorm, fused.

        c = DW(x) + conv_bias;  y = LN(act(c)), or act(LN(c)) with norm_first

    With activation="none" it is the first half of every ConvNeXt block; with "gelu", the second
    half of the ConvNeSt roadmap's `pre_activation` design, and with norm_first of `vanilla`.

    Args:
        x: [N, H, W, C], any strides; float32, bfloat16, float16 or float64.
        conv_weight: [C, 1, k, k], k odd, as nn.Conv2d holds it; in the dtype of x, or float32
            beside bfloat16 and float16 activations. So are all the parameters.
        conv_bias: [C] or None.
        ln_weight: [C] or None for a norm without scale.
        ln_bias: [C] or None.
        eps: added to the variance; statistics are float32 (float64 for float64).
        activation: "gelu" (the exact erf form) or "none".
        norm_first: normalize before the activation.
        backend: "auto", "cuda", "triton", "cpu" or "eager"; None takes `use_backend`'s choice.

    Returns:
        y: [N, H, W, C], contiguous, in the dtype of x (of autocast, where that is on).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, by name.
        BackendError: the backend asked for cannot run this call; it never falls back.
    """
    x = _contract.autocast("x", x)
    call = describe(x, conv_weight, conv_bias, ln_weight, ln_bias, eps=eps, activation=activation)
    backend = backends.requested(backend)
    inputs = (x, conv_weight, conv_bias, ln_weight, ln_bias)
    if _contract.runs_eager(call, backend):
        with _contract.without_autocast(x):
            return eager_dwconv_gelu_layernorm(
                *inputs, eps=eps, activation=activation, norm_first=norm_first
            ).contiguous()
    if _contract.wants_gradients(*inputs):
        return _DwconvGeluLayernorm.apply(*inputs, eps, activation, norm_first, backend)
    return _contract.registered.dwconv_gelu_layernorm_forward(
        *inputs, eps, activation, norm_first, False, backend
    )[0]


def describe(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    *,
    eps: float = 1e-6,
    activation: str = "gelu",
    norm_first: bool = False,
) -> Call:
    """Check the arguments of `dwconv_gelu_layernorm` and describe the call to the backends."""
    _contract.check_activation("x", x, "N, H, W, C")
    _contract.check_conv_weight("conv_weight", conv_weight, x)
    _contract.check_parameter("conv_bias", conv_bias, "[C]", x)
    _contract.check_parameter("ln_weight", ln_weight, "[C]", x)
    _contract.check_parameter("ln_bias", ln_bias, "[C]", x)
    _contract.check_eps(eps, x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be 'gelu' or 'none', got {activation!r}")
    return _call(x, conv_weight)


def _call(x: Tensor, conv_weight: Tensor) -> Call:
    shape = tuple(x.shape)
    return Call(
        "dwconv_gelu_layernorm", x.device.type, x.dtype, shape[-1], conv_weight.shape[2], shape
    )


class _DwconvGeluLayernorm(torch.autograd.Function):
    """Keeps x and c of the wide tensors, and the row statistics."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, eps, activation, norm_first, backend = args
        y, c, mean, rstd = _contract.registered.dwconv_gelu_layernorm_forward(
            *inputs, eps, activation, norm_first, True, backend
        )
        ctx.save_for_backward(*inputs, c, mean, rstd)
        ctx.options = eps, activation, norm_first, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        *inputs, c, mean, rstd = ctx.saved_tensors
        eps, activation, norm_first, backend = ctx.options
        needs = ctx.needs_input_grad[: len(inputs)]
        if _contract.differentiates_twice():
            grads = _contract.eager_gradients(
                eager_dwconv_gelu_layernorm,
                inputs,
                dy,
                needs,
                eps=eps,
                activation=activation,
                norm_first=norm_first,
            )
        else:
            x, *parameters = inputs
            grads = _contract.registered.dwconv_gelu_layernorm_backward(
                dy, x, c, mean, rstd, *parameters, eps, activation, norm_first, needs, backend
            )
            grads = _contract.needed(grads, needs)
        return *grads, None, None, None, None


def _forward(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    activation: str,
    norm_first: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    if x.numel() == 0:
        return _outputs(x, keep)
    kernel = backends.implementation(_call(x, conv_weight), backend)
    parameters = (conv_weight, conv_bias, ln_weight, ln_bias)
    return kernel.forward(x.contiguous(), *parameters, eps, activation, norm_first, keep)


def _outputs(x: Tensor, keep: bool) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *_contract.kept(x, keep)


def _backward(
    dy: Tensor,
    x: Tensor,
    c: Tensor,
    mean: Tensor,
    rstd: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    activation: str,
    norm_first: bool,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    inputs = (x, conv_weight, conv_bias, ln_weight, ln_bias)
    if x.numel() == 0:
        return _contract.zero_gradients(inputs, needs)
    kernel = backends.implementation(_call(x, conv_weight), backend)
    options = (eps, activation, norm_first, needs)
    grads = kernel.backward(dy.contiguous(), x.contiguous(), c, mean, rstd, *inputs[1:], *options)
    return _contract.match_all(grads, inputs, needs)


_contract.register(
    "dwconv_gelu_layernorm_forward(Tensor x, Tensor conv_weight, Tensor? conv_bias, "
    "Tensor? ln_weight, Tensor? ln_bias, float eps, str activation, bool norm_first, bool keep, "
    "str backend) -> (Tensor y, Tensor c, Tensor mean, Tensor rstd)",
    _forward,
    lambda x, *args: _outputs(x, keep=args[-2]),
)
_contract.register(
    "dwconv_gelu_layernorm_backward(Tensor dy, Tensor x, Tensor c, Tensor mean, Tensor rstd, "
    "Tensor conv_weight, Tensor? conv_bias, Tensor? ln_weight, Tensor? ln_bias, float eps, "
    "str activation, bool norm_first, bool[] needs, str backend) "
    "-> (Tensor dx, Tensor dconv_weight, Tensor dconv_bias, Tensor dln_weight, Tensor dln_bias)",
    _backward,
    lambda dy, x, c, mean, rstd, *args: _contract.fake_gradients((x, *args[:4]), args[-2]),
)
_contract.register_conv_flops("dwconv_gelu_layernorm")
