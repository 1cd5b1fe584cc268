"""nested_block: the whole ConvNeSt block, x → y.

One fused operator on the CPU kernels; elsewhere torch's linear layers and our other operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils.checkpoint import checkpoint

from .. import backends, cpu
from ..backends import Call
from ..reference import nested_block as eager_nested_block
from ..reference.common import linear, new_statistics
from . import _contract
from .layernorm_residual import layernorm_residual
from .nested_conv import nested_conv

RECOMPUTE = ("none", "conv", "all")


def nested_block(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    scale: Tensor | None = None,
    *,
    eps: float = 1e-6,
    shortcut: bool = True,
    recompute: str = "none",
    backend: str | None = None,
) -> Tensor:
    """A whole ConvNeSt block (the paper's `convnest` design; `post_norm` without shortcut).

        h = x·W1ᵀ + b1;  v = nested_conv(h);  t = v·W2ᵀ + b2;  y = scale ⊙ x + LN(t)

    Args:
        x: [N, H, W, C], any strides; float32, bfloat16, float16 or float64.
        fc1_weight: [D, C]; D is the wide channel count. Parameters are in the dtype of x, or
            float32 beside bfloat16 and float16 activations.
        fc1_bias: [D] or None.
        norm_weight, norm_bias: [D] or None: the LayerNorm before the convolution.
        conv_weight: [D, 1, k, k], k odd, as nn.Conv2d holds it.
        conv_bias: [D] or None.
        fc2_weight: [C, D].
        fc2_bias: [C] or None.
        post_weight, post_bias: [C] or None: the LayerNorm before the outer shortcut.
        scale: [C], ResScale; None for 1.
        eps: added to the variances.
        shortcut: the inner shortcut.
        recompute: which wide tensors backward computes again in place of keeping them: "none"
            keeps h and u (and v, where the block is not one operator); "conv" keeps h alone; "all"
            keeps none, only x (and t, which is as narrow).
        backend: as everywhere. "cpu", and "auto" on the CPU, run the block as one operator; on the
            others torch's linear layers stand between a `nested_conv` and a `layernorm_residual`.

    Returns:
        y: [N, H, W, C], contiguous, in the dtype of x (of autocast, where that is on).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, by name.
        BackendError: the backend asked for cannot run this call; it never falls back.
    """
    _check(
        x, fc1_weight, fc1_bias, norm_weight, norm_bias, conv_weight, conv_bias,
        fc2_weight, fc2_bias, post_weight, post_bias, scale, eps, recompute,
    )  # fmt: skip
    backend = backends.requested(backend)
    inputs = (
        x, fc1_weight, fc1_bias, norm_weight, norm_bias, conv_weight, conv_bias,
        fc2_weight, fc2_bias, post_weight, post_bias, scale,
    )  # fmt: skip
    if not _is_one_operator(x, conv_weight, backend):
        return _compose(*inputs, eps, shortcut, recompute, backend)
    x = _contract.autocast("x", x)
    if _contract.wants_gradients(*inputs):
        return _NestedBlock.apply(x, *inputs[1:], eps, shortcut, recompute)
    return _contract.registered.nested_block_forward(x, *inputs[1:], eps, shortcut, None)[0]


def _is_one_operator(x: Tensor, conv_weight: Tensor, backend: str) -> bool:
    """Whether the CPU kernels run the call; where a transform is active, the others do."""
    if x.device.type != "cpu" or backend not in ("auto", "cpu"):
        return False
    if _contract.transform_is_active():
        return False
    return not cpu.reasons_against(_call(x, conv_weight))


def _call(x: Tensor, conv_weight: Tensor) -> Call:
    wide, _, kernel_size, _ = conv_weight.shape
    return Call("nested_block", x.device.type, x.dtype, wide, kernel_size, tuple(x.shape))


def _compose(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, conv_weight: Tensor, conv_bias: Tensor | None, fc2_weight: Tensor,
    fc2_bias: Tensor | None, post_weight: Tensor | None, post_bias: Tensor | None,
    scale: Tensor | None, eps: float, shortcut: bool, recompute: str, backend: str,
) -> Tensor:  # fmt: skip
    def expand(x: Tensor) -> Tensor:
        return linear(x, fc1_weight, fc1_bias)

    def convolve_and_reduce(h: Tensor) -> Tensor:
        v = nested_conv(
            h, conv_weight, conv_bias, norm_weight, norm_bias,
            eps=eps, shortcut=shortcut, backend=backend,
        )  # fmt: skip
        return linear(v, fc2_weight, fc2_bias)

    if recompute == "all" and torch.is_grad_enabled():
        t = checkpoint(
            lambda x: convolve_and_reduce(expand(x)),
            x,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    elif recompute == "conv" and torch.is_grad_enabled():
        t = checkpoint(
            convolve_and_reduce, expand(x), use_reentrant=False, preserve_rng_state=False
        )
    else:
        t = convolve_and_reduce(expand(x))
    return layernorm_residual(t, x, post_weight, post_bias, scale, eps=eps, backend=backend)


def describe(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, conv_weight: Tensor, conv_bias: Tensor | None, fc2_weight: Tensor,
    fc2_bias: Tensor | None, post_weight: Tensor | None, post_bias: Tensor | None,
    scale: Tensor | None = None, *, eps: float = 1e-6, shortcut: bool = True,
    recompute: str = "none",
) -> Call:  # fmt: skip
    """Check the arguments of `nested_block` and describe its wide half, a `nested_conv`."""
    _check(
        x, fc1_weight, fc1_bias, norm_weight, norm_bias, conv_weight, conv_bias,
        fc2_weight, fc2_bias, post_weight, post_bias, scale, eps, recompute,
    )  # fmt: skip
    wide = fc1_weight.shape[0]
    shape = (*x.shape[:-1], wide)
    return Call("nested_conv", x.device.type, x.dtype, wide, conv_weight.shape[2], tuple(shape))


def _check(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, conv_weight: Tensor, conv_bias: Tensor | None, fc2_weight: Tensor,
    fc2_bias: Tensor | None, post_weight: Tensor | None, post_bias: Tensor | None,
    scale: Tensor | None, eps: float, recompute: str,
) -> None:  # fmt: skip
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be 'none', 'conv' or 'all', got {recompute!r}")
    _contract.check_activation("x", x, "N, H, W, C")
    narrow = x.shape[-1]
    wide = _contract.check_matrix("fc1_weight", fc1_weight, "D", narrow, x)
    if wide == 0:
        raise ValueError(f"fc1_weight must have at least one row, got {list(fc1_weight.shape)}")
    _contract.check_matrix("fc2_weight", fc2_weight, narrow, wide, x)
    _contract.check_conv_weight("conv_weight", conv_weight, x, wide)
    for name, parameter in (
        ("fc1_bias", fc1_bias),
        ("norm_weight", norm_weight),
        ("norm_bias", norm_bias),
        ("conv_bias", conv_bias),
    ):
        _contract.check_parameter(name, parameter, "[D]", x, wide)
    for name, parameter in (
        ("fc2_bias", fc2_bias),
        ("post_weight", post_weight),
        ("post_bias", post_bias),
        ("scale", scale),
    ):
        _contract.check_parameter(name, parameter, "[C]", x, narrow)
    _contract.check_eps(eps, x)


class _NestedBlock(torch.autograd.Function):
    """Keeps x, t, the statistics of both norms and, as `recompute` says, h and u."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, eps, shortcut, recompute = args
        y, *kept = _contract.registered.nested_block_forward(*inputs, eps, shortcut, recompute)
        ctx.save_for_backward(*inputs, *kept)
        ctx.options = eps, shortcut
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: under activation checkpointing each access unpacks
        inputs, kept = saved[:_INPUTS], saved[_INPUTS:]
        eps, shortcut = ctx.options
        needs = ctx.needs_input_grad[:_INPUTS]
        if _contract.differentiates_twice():
            grads = _contract.eager_gradients(
                eager_nested_block, inputs, dy, needs, eps=eps, shortcut=shortcut
            )
        else:
            x, *parameters = inputs
            grads = _contract.registered.nested_block_backward(
                dy, x, *kept, *parameters, eps, shortcut, needs
            )
            grads = _contract.needed(grads, needs)
        return *grads, None, None, None


def _forward(x: Tensor, *args: Any) -> list[Tensor]:
    *parameters, eps, shortcut, recompute = args
    outputs = _outputs(x, *args)
    if x.numel() > 0:
        kernel = backends.implementation(_call(x, parameters[4]), "cpu")
        kernel.forward(
            x.contiguous(), parameters, outputs, eps, shortcut, keep=recompute is not None
        )
    return outputs


def _outputs(x: Tensor, *args: Any) -> list[Tensor]:
    """Uninitialised y; for a backward also h, u, mean, rstd, t, post_mean and post_rstd.

    h and u are empty where they are computed again.
    """
    fc1_weight, recompute = args[0], args[-1]
    y = x.new_empty(x.shape)
    if recompute is None:
        return [y]
    wide = (*x.shape[:-1], fc1_weight.shape[0])
    return [
        y,
        x.new_empty(0 if recompute == "all" else wide),
        x.new_empty(wide if recompute == "none" else 0),
        *new_statistics(x, True),
        *_contract.kept(x, True),
    ]


def _backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    kept, parameters = args[:_KEPT], args[_KEPT : _KEPT + _INPUTS - 1]
    eps, shortcut, needs = args[-3:]
    inputs = (x, *parameters)
    if x.numel() == 0:
        return _contract.zero_gradients(inputs, needs)
    kernel = backends.implementation(_call(x, parameters[4]), "cpu")
    grads = kernel.backward(dy.contiguous(), x.contiguous(), kept, parameters, eps, shortcut, needs)
    return _contract.match_all(grads, inputs, needs)


_INPUTS, _KEPT = 12, 7

_PARAMETERS = (
    "Tensor fc1_weight, Tensor? fc1_bias, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor conv_weight, Tensor? conv_bias, Tensor fc2_weight, Tensor? fc2_bias, "
    "Tensor? post_weight, Tensor? post_bias, Tensor? scale, float eps, bool shortcut"
)
_contract.register(
    # recompute: what a backward will compute again; None where there will be none.
    f"nested_block_forward(Tensor x, {_PARAMETERS}, str? recompute) -> Tensor[]",
    _forward,
    _outputs,
)
_contract.register(
    "nested_block_backward(Tensor dy, Tensor x, Tensor h, Tensor u, Tensor mean, Tensor rstd, "
    f"Tensor t, Tensor post_mean, Tensor post_rstd, {_PARAMETERS}, bool[] needs) "
    "-> (Tensor dx, Tensor dfc1_weight, Tensor dfc1_bias, Tensor dnorm_weight, "
    "Tensor dnorm_bias, Tensor dconv_weight, Tensor dconv_bias, Tensor dfc2_weight, "
    "Tensor dfc2_bias, Tensor dpost_weight, Tensor dpost_bias, Tensor dscale)",
    _backward,
    lambda dy, x, *args: _contract.fake_gradients(
        (x, *args[_KEPT : _KEPT + _INPUTS - 1]), args[-1]
    ),
)


def _flops(x_shape: Sequence[int], fc1_shape: Sequence[int], conv_shape: Sequence[int]) -> int:
    """Two linear layers and the taps, as they would count one by one."""
    return 2 * math.prod(x_shape[:-1]) * (2 * math.prod(fc1_shape) + math.prod(conv_shape))


flop_counter.register_flop_formula(_contract.registered.nested_block_forward)(
    lambda x, fc1, b1, gamma, beta, conv, *_, **__: _flops(x, fc1, conv)
)
# What is recomputed counts nothing: the same work, whatever was kept.
flop_counter.register_flop_formula(_contract.registered.nested_block_backward)(
    lambda dy, x, *args, **__: 2 * _flops(x, args[_KEPT], args[_KEPT + 4])
)
