"""nested_block: the whole ConvNeSt block, x → y, composed of torch's linears and our operators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from convnest_kernels import backends
from convnest_kernels.backends import Call
from convnest_kernels.ops import _contract
from convnest_kernels.ops.layernorm_residual import layernorm_residual
from convnest_kernels.ops.nested_conv import nested_conv
from convnest_kernels.reference.common import linear

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
            keeps h, u and v; "conv" keeps h alone; "all" keeps none, only x.
        backend: of the wide and of the outer operator, as everywhere.

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
