"""gelu_layernorm's CUDA kernels on the host emulation, against the eager formula in float64."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch import Tensor

from convnest_kernels.reference.gelu_layernorm import backward as eager_backward
from convnest_kernels.reference.gelu_layernorm import forward as eager_forward
from tests import emulation
from tests.tolerances import assert_accurate, assert_statistics, bound

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))

EPS = 1e-6
GRADIENTS = ("dx", "dln_weight", "dln_bias")

# Rows, channels: fewer and more rows than groups; 1 to 8 warps to a row; odd channels; two vectors
# to a thread in backward
SHAPES = [(3, 24), (700, 8), (37, 96), (5, 13), (1, 1), (4, 576), (3, 1056), (2, 3000), (3, 4608)]


class FwdParams(emulation.Params):
    _fields_ = emulation.fields(
        "x ln_weight ln_bias y mean rstd",
        "",
        ("rows", ctypes.c_int64),
        ("C", ctypes.c_int),
        ("eps", ctypes.c_float),
        ("norm_first", ctypes.c_bool),
    )


class BwdParams(emulation.Params):
    _fields_ = emulation.fields(
        "dy x mean rstd ln_weight ln_bias dx dln_weight dln_bias workspace",
        "",
        ("rows", ctypes.c_int64),
        ("C", ctypes.c_int),
        ("norm_first", ctypes.c_bool),
    )


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, norm_first: bool, keep: bool = True
) -> tuple[Tensor | None, ...]:
    rows, C = x.shape
    inputs = {"x": x, "ln_weight": weight, "ln_bias": bias}
    outputs = {
        "y": torch.full_like(x, torch.nan),
        "mean": torch.full((rows,), torch.nan) if keep else None,
        "rstd": torch.full((rows,), torch.nan) if keep else None,
    }
    params = FwdParams.of(**inputs, **outputs, rows=rows, C=C, eps=EPS, norm_first=norm_first)
    emulation.run(
        "gelu_layernorm_fwd",
        ctypes.byref(params),
        emulation.TYPES.index(x.dtype),
        inputs=inputs,
        outputs=outputs,
        seed=2,
    )
    return tuple(outputs.values())


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_first: bool,
    seed: int = 3,
) -> tuple[Tensor, ...]:
    rows, C = x.shape
    size = emulation.library().gelu_layernorm_bwd_workspace(rows, C)
    inputs = dict(dy=dy, x=x, mean=mean, rstd=rstd, ln_weight=weight, ln_bias=bias)
    outputs = {
        "dx": torch.full_like(x, torch.nan),
        "dln_weight": torch.full((C,), torch.nan),
        "dln_bias": torch.full((C,), torch.nan),
        "workspace": torch.full((size // 4,), torch.nan),
    }
    params = BwdParams.of(**inputs, **outputs, rows=rows, C=C, norm_first=norm_first)
    emulation.run(
        "gelu_layernorm_bwd",
        ctypes.byref(params),
        emulation.TYPES.index(x.dtype),
        inputs=inputs,
        outputs=outputs,
        seed=seed,
    )
    return tuple(outputs.values())[:3]


def arguments(
    shape: tuple[int, int], dtype: torch.dtype, affine: bool = True
) -> tuple[Tensor | None, ...]:
    x = torch.randn(shape).to(dtype)
    return x, *((torch.randn(shape[1]) if affine else None) for _ in range(2))


def to(dtype: torch.dtype, tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def test_params_have_the_cores_layout():
    lib = emulation.library()
    assert lib.gelu_layernorm_fwd_params_bytes() == ctypes.sizeof(FwdParams)
    assert lib.gelu_layernorm_bwd_params_bytes() == ctypes.sizeof(BwdParams)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(shape, dtype, norm_first):
    inputs = arguments(shape, dtype)
    dy = torch.randn(shape).to(dtype)
    y, mean, rstd = forward(*inputs, norm_first)
    double, low = to(torch.float64, inputs), to(dtype, inputs)
    truth = eager_forward(*double, EPS, norm_first, True)
    eager = eager_forward(*low, EPS, norm_first, True)
    spread = truth[2].max().item()
    assert_accurate("y", y, eager[0], truth[0], rstd=spread)
    assert_statistics(mean, rstd, *truth[1:], dtype)

    ours = backward(dy, inputs[0], mean, rstd, *inputs[1:], norm_first)

    def gradients(dy, tensors, kept):
        x, *affine = tensors
        return eager_backward(dy, x, kept[1], kept[2], *affine, EPS, norm_first, (True,) * 3)

    true, theirs = gradients(dy.double(), double, truth), gradients(dy, low, eager)
    assert_accurate("dx", ours[0], theirs[0], true[0], rstd=spread)
    rounding = torch.finfo(dtype).eps * math.sqrt(shape[0]) / 2
    for name, mine, other, right in list(zip(GRADIENTS, ours, theirs, true, strict=True))[1:]:
        assert mine.isfinite().all(), name
        error = (mine.double() - right).abs().max().item()
        assert error <= bound(other, right, shape[0], spread) + rounding, (
            f"{name} is off by {error}"
        )


@pytest.mark.parametrize("norm_first", [False, True])
def test_without_affine_and_without_statistics(norm_first):
    x, weight, bias = arguments((9, 40), torch.bfloat16, affine=False)
    y, mean, rstd = forward(x, weight, bias, norm_first, keep=False)
    assert mean is None and rstd is None
    truth = eager_forward(x.double(), None, None, EPS, norm_first, False)[0]
    eager = eager_forward(x, None, None, EPS, norm_first, False)[0]
    assert_accurate("y", y, eager, truth)


def test_backward_does_not_depend_on_the_order_of_threads_and_blocks():
    inputs = arguments((300, 100), torch.bfloat16)
    dy = torch.randn(300, 100).bfloat16()
    _, mean, rstd = forward(*inputs, False)
    results = [
        backward(dy, inputs[0], mean, rstd, *inputs[1:], False, seed=seed) for seed in range(4)
    ]
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
