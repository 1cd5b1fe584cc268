"""Every argument check: the error names the argument, what was expected and what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from convnest_kernels import ops

X = torch.randn(2, 4, 5, 6)
W = torch.randn(6, 1, 3, 3)
V = torch.randn(6)


def call(operator: str, **changes: Any) -> Tensor:
    arguments: dict[str, dict[str, Any]] = {
        "nested_conv": dict(h=X, conv_weight=W, conv_bias=V, ln_weight=V, ln_bias=V),
        "dwconv_gelu_layernorm": dict(x=X, conv_weight=W, conv_bias=V, ln_weight=V, ln_bias=V),
        "gelu_layernorm": dict(x=X, ln_weight=V, ln_bias=V),
        "layernorm_residual": dict(t=X, x=X, ln_weight=V, ln_bias=V, scale=V),
        "nested_block": dict(
            x=X, fc1_weight=torch.randn(12, 6), fc1_bias=torch.randn(12),
            norm_weight=torch.randn(12), norm_bias=torch.randn(12),
            conv_weight=torch.randn(12, 1, 3, 3), conv_bias=torch.randn(12),
            fc2_weight=torch.randn(6, 12), fc2_bias=V, post_weight=V, post_bias=V, scale=V,
        ),
    }  # fmt: skip
    function: Callable[..., Tensor] = getattr(ops, operator)
    return function(**arguments[operator] | changes)


@pytest.mark.parametrize(
    ("operator", "changes", "error", "message"),
    [
        ("nested_conv", dict(h=[1.0]), TypeError, "h must be a torch.Tensor, got list"),
        ("nested_conv", dict(h=X[0]), ValueError, "h must be [N, H, W, C], got [4, 5, 6]"),
        (
            "nested_conv",
            dict(h=X.long()),
            TypeError,
            "h must be one of float32, bfloat16, float16, float64, got torch.int64",
        ),
        (
            "nested_conv",
            dict(h=X[..., :0]),
            ValueError,
            "h must have at least one channel, got [2, 4, 5, 0]",
        ),
        (
            "nested_conv",
            dict(conv_weight=W[:5]),
            ValueError,
            "conv_weight must be [6, 1, k, k], got [5, 1, 3, 3]",
        ),
        (
            "nested_conv",
            dict(conv_weight=W[..., :2]),
            ValueError,
            "conv_weight must have a square kernel of odd size, [6, 1, k, k], got [6, 1, 3, 2]",
        ),
        (
            "nested_conv",
            dict(conv_weight=torch.randn(6, 1, 4, 4)),
            ValueError,
            "conv_weight must have a square kernel of odd size, [6, 1, k, k], got [6, 1, 4, 4]",
        ),
        (
            "dwconv_gelu_layernorm",
            dict(conv_weight=W.numpy()),
            TypeError,
            "conv_weight must be a torch.Tensor, got ndarray",
        ),
        (
            "nested_conv",
            dict(conv_bias=V[:3]),
            ValueError,
            "conv_bias must be [C] = [6], got [3]",
        ),
        ("nested_conv", dict(ln_weight=1.0), TypeError, "ln_weight must be a torch.Tensor, got"),
        ("nested_conv", dict(ln_bias=W), ValueError, "ln_bias must be [C] = [6], got [6, 1, 3, 3]"),
        (
            "nested_conv",
            dict(ln_weight=V.double()),
            TypeError,
            "ln_weight must be torch.float32 beside torch.float32 activations, got torch.float64",
        ),
        (
            "nested_conv",
            dict(h=X.bfloat16(), ln_bias=V.half()),
            TypeError,
            "ln_bias must be torch.bfloat16 or torch.float32 beside torch.bfloat16 activations, "
            "got torch.float16",
        ),
        (
            "nested_conv",
            dict(conv_bias=V.to("meta")),
            ValueError,
            "conv_bias must be on cpu like the activation, got meta",
        ),
        ("nested_conv", dict(eps=0.0), ValueError, "eps must be finite and at least 1.18e-38"),
        ("nested_conv", dict(eps=float("nan")), ValueError, "got nan"),
        ("nested_conv", dict(eps=-1e-6), ValueError, "got -1e-06"),
        ("nested_conv", dict(eps=1e-40), ValueError, "(statistics are torch.float32), got 1e-40"),
        ("nested_conv", dict(eps="1"), TypeError, "eps must be a float, got str"),
        (
            "dwconv_gelu_layernorm",
            dict(activation="relu"),
            ValueError,
            "activation must be 'gelu' or 'none', got 'relu'",
        ),
        ("gelu_layernorm", dict(x=torch.tensor(1.0)), ValueError, "x must be [..., C], got []"),
        ("gelu_layernorm", dict(ln_weight=V[1:]), ValueError, "ln_weight must be [C] = [6]"),
        (
            "layernorm_residual",
            dict(x=X[:1]),
            ValueError,
            "x must have the shape of t, [2, 4, 5, 6], got [1, 4, 5, 6]",
        ),
        (
            "layernorm_residual",
            dict(x=X.double()),
            TypeError,
            "x must have the dtype of t, torch.float32, got torch.float64",
        ),
        (
            "layernorm_residual",
            dict(x=X.to("meta")),
            ValueError,
            "x must be on cpu like t, got meta",
        ),
        ("layernorm_residual", dict(scale=W), ValueError, "scale must be [C] = [6]"),
        (
            "nested_block",
            dict(fc1_weight=W),
            ValueError,
            "fc1_weight must be [D, 6], got [6, 1, 3, 3]",
        ),
        (
            "nested_block",
            dict(fc2_weight=torch.randn(6, 11)),
            ValueError,
            "fc2_weight must be [6, 12], got [6, 11]",
        ),
        ("nested_block", dict(conv_weight=W), ValueError, "conv_weight must be [12, 1, k, k]"),
        ("nested_block", dict(norm_weight=V), ValueError, "norm_weight must be [D] = [12], got"),
        ("nested_block", dict(post_bias=V[1:]), ValueError, "post_bias must be [C] = [6], got"),
        (
            "nested_block",
            dict(recompute="some"),
            ValueError,
            "recompute must be 'none', 'conv' or 'all', got 'some'",
        ),
    ],
)
def test_message(
    operator: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    call(operator)
    with pytest.raises(error, match=re.escape(message)):
        call(operator, **changes)
