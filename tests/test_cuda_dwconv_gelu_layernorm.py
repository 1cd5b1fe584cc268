"""dwconv_gelu_layernorm's CUDA kernels on the host emulation, against float64."""

from __future__ import annotations

import ctypes
import dataclasses
import math

import pytest
import torch
from torch import Tensor

from convnest_kernels.reference.dwconv_gelu_layernorm import backward as eager_backward_of
from convnest_kernels.reference.dwconv_gelu_layernorm import forward as eager_forward_of
from tests import emulation
from tests.tolerances import assert_accurate, bound

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))

EPS = 1e-6
NAMES = ("x", "conv_weight", "conv_bias", "ln_weight", "ln_bias")
GRADIENTS = ("dx", "dconv_weight", "dconv_bias", "dln_weight", "dln_bias")


class FwdParams(emulation.Params):
    _fields_ = emulation.fields(
        "x conv_weight conv_bias ln_weight ln_bias y c mean rstd",
        "N H W C",
        ("eps", ctypes.c_float),
        ("gelu", ctypes.c_bool),
        ("norm_first", ctypes.c_bool),
    )


class BwdParams(emulation.Params):
    _fields_ = emulation.fields(
        "dy x c mean rstd conv_weight ln_weight ln_bias "
        "dx dconv_weight dconv_bias dln_weight dln_bias workspace",
        "N H W C",
        ("gelu", ctypes.c_bool),
        ("norm_first", ctypes.c_bool),
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: shape, kernel size, type, options and the order of threads."""

    shape: tuple[int, int, int, int]
    kernel_size: int = 7
    dtype: torch.dtype = torch.bfloat16
    gelu: bool = True
    norm_first: bool = False
    affine: bool = True
    bias: bool = True
    seed: int = 2

    def __str__(self) -> str:
        options = [f"{'x'.join(map(str, self.shape))}-k{self.kernel_size}"]
        options += [str(self.dtype).removeprefix("torch.")]
        options += ["gelu" if self.gelu else "none"] + ["norm_first"] * self.norm_first
        options += [f"no_{name}" for name in ("affine", "bias") if not getattr(self, name)]
        return "-".join([*options, str(self.seed)])


CASES = [
    # Every order and activation, several images beside and below each other
    Case((13, 9, 7, 24)),
    Case((3, 14, 14, 16), dtype=torch.float16, norm_first=True),
    Case((2, 9, 28, 32), gelu=False, seed=0),
    Case((2, 9, 56, 16), gelu=False, norm_first=True, seed=1),
    # Where the image is the tile (test_cuda_small_maps.py has more)
    Case((5, 7, 7, 24), norm_first=True),
    # Images cut into parts, and into strips
    Case((1, 61, 9, 8), norm_first=True, seed=3),
    Case((1, 3, 125, 16), gelu=False),
    # Smaller than the kernel; channels that no 16-byte access divides
    Case((3, 1, 1, 24)),
    Case((2, 2, 3, 40), norm_first=True),
    Case((1, 6, 5, 1), gelu=False),
    Case((2, 8, 10, 13), dtype=torch.float16),
    Case((1, 2, 2, 4104), gelu=False),
    # The other kernel sizes, and what may be left out
    Case((2, 10, 11, 16), kernel_size=3),
    Case((2, 5, 11, 24), kernel_size=5, norm_first=True, dtype=torch.float16),
    Case((2, 12, 13, 16), kernel_size=9, gelu=False),
    Case((2, 9, 9, 16), affine=False, bias=False),
    Case((2, 9, 9, 12), affine=False, bias=False, norm_first=True),
    # On the FMA units: float32, and sizes that the band does not fit
    Case((9, 7, 7, 40), dtype=torch.float32),
    Case((2, 9, 31, 32), dtype=torch.float32, norm_first=True, seed=0),
    Case((1, 37, 65, 5), dtype=torch.float32, gelu=False, seed=1),
    Case((3, 1, 1, 24), dtype=torch.float32, kernel_size=3),
    Case((2, 6, 9, 33), dtype=torch.float32, kernel_size=5, norm_first=True, seed=3),
    Case((2, 6, 10, 8), dtype=torch.float32, kernel_size=9, affine=False, bias=False),
    Case((1, 8, 11, 12), dtype=torch.float32, kernel_size=11),
    Case((1, 14, 9, 4), dtype=torch.float32, kernel_size=13, gelu=False),
    Case((2, 9, 12, 24), kernel_size=11),
    Case((1, 13, 30, 7), kernel_size=13, dtype=torch.float16, norm_first=True),
]


def arguments(case: Case) -> tuple[Tensor | None, ...]:
    """Random x and parameters (float32) of a case."""
    C, k = case.shape[-1], case.kernel_size
    x = torch.randn(case.shape).to(case.dtype)
    conv_weight = torch.randn(C, 1, k, k) / k
    conv_bias = torch.randn(C) if case.bias else None
    ln_weight, ln_bias = (torch.randn(C), torch.randn(C)) if case.affine else (None, None)
    return x, conv_weight, conv_bias, ln_weight, ln_bias


def options(case: Case) -> dict[str, object]:
    sizes = dict(zip("NHWC", case.shape, strict=True))
    return {**sizes, "gelu": case.gelu, "norm_first": case.norm_first}


def forward(
    case: Case, *inputs: Tensor | None, keep: bool = True, **faults: object
) -> tuple[Tensor | None, ...]:
    x = inputs[0]
    outputs = {
        "y": torch.full_like(x, torch.nan),
        "c": torch.full_like(x, torch.nan),
        "mean": torch.full(x.shape[:-1], torch.nan) if keep else None,
        "rstd": torch.full(x.shape[:-1], torch.nan) if keep else None,
    }
    tensors = dict(zip(NAMES, inputs, strict=True))
    params = FwdParams.of(**tensors, **outputs, **options(case), eps=EPS)
    emulation.run(
        "dwconv_gelu_layernorm_fwd",
        ctypes.byref(params),
        case.kernel_size,
        emulation.TYPES.index(case.dtype),
        inputs=tensors,
        outputs=outputs,
        **{"seed": case.seed, **faults},
    )
    return tuple(outputs.values())


def backward(
    case: Case,
    dy: Tensor,
    kept: tuple[Tensor, ...],
    inputs: tuple[Tensor | None, ...],
    needs: tuple[bool, ...] = (True,) * 5,
    **faults: object,
) -> tuple[Tensor | None, ...]:
    x, conv_weight, _, ln_weight, ln_bias = inputs
    C, type_of = x.shape[-1], emulation.TYPES.index(case.dtype)
    workspace_bytes = emulation.library().dwconv_gelu_layernorm_bwd_workspace
    workspace_bytes.restype = ctypes.c_size_t
    size = workspace_bytes(*case.shape, case.kernel_size, type_of)
    shapes = (x.shape, conv_weight.shape, (C,), (C,), (C,))
    dtypes = (x.dtype, *[torch.float32] * 4)
    outputs = {
        name: torch.full(shape, torch.nan, dtype=dtype) if need else None
        for name, need, shape, dtype in zip(GRADIENTS, needs, shapes, dtypes, strict=True)
    }
    workspace = torch.full((size // 4,), torch.nan)
    tensors = {
        **dict(zip(("c", "mean", "rstd"), kept[1:], strict=True)),
        "dy": dy,
        "x": x,
        "conv_weight": conv_weight,
        "ln_weight": ln_weight,
        "ln_bias": ln_bias,
    }
    params = BwdParams.of(**tensors, **outputs, workspace=workspace, **options(case))
    emulation.run(
        "dwconv_gelu_layernorm_bwd",
        ctypes.byref(params),
        case.kernel_size,
        type_of,
        inputs=tensors,
        outputs={**outputs, "workspace": workspace},
        **{"seed": case.seed, **faults},
    )
    return tuple(outputs.values())


def eager(case: Case, dtype: torch.dtype, inputs: tuple, dy: Tensor) -> tuple[tuple, tuple]:
    """What forward keeps and the gradients, by the eager formula in `dtype`."""
    x, *parameters = (None if t is None else t.to(dtype) for t in inputs)
    activation = "gelu" if case.gelu else "none"
    kept = eager_forward_of(x, *parameters, EPS, activation, case.norm_first, True)
    rest = (EPS, activation, case.norm_first, (True,) * 5)
    return kept, eager_backward_of(dy.to(dtype), x, *kept[1:], *parameters, *rest)


def test_params_have_the_cores_layout():
    lib = emulation.library()
    assert lib.dwconv_gelu_layernorm_fwd_params_bytes() == ctypes.sizeof(FwdParams)
    assert lib.dwconv_gelu_layernorm_bwd_params_bytes() == ctypes.sizeof(BwdParams)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case):
    inputs = arguments(case)
    dy = torch.randn(case.shape).to(case.dtype)
    kept = forward(case, *inputs)
    truth, true_gradients = eager(case, torch.float64, inputs, dy)
    low, low_gradients = eager(case, case.dtype, inputs, dy)
    spread = truth[3].max().item()
    assert_accurate("c", kept[1], low[1], truth[1])
    assert_accurate("y", kept[0], low[0], truth[0], rstd=spread)
    ours = backward(case, dy, kept, inputs)
    assert_accurate("dx", ours[0], low_gradients[0], true_gradients[0], rstd=spread)
    # A parameter's gradient sums a term of the order of 1 for each pixel, made of values rounded to
    # the activations' type; eager's own error is a small sample where there are few channels.
    rows = math.prod(case.shape[:-1])
    rounding = torch.finfo(case.dtype).eps * math.sqrt(rows) / 2 * max(spread, 1.0)
    for i, name in list(enumerate(GRADIENTS))[1:]:
        assert ours[i].isfinite().all(), name
        error = (ours[i].double() - true_gradients[i]).abs().max().item()
        limit = bound(low_gradients[i], true_gradients[i], rows, spread) + rounding
        assert error <= limit, f"{name} is off by {error}, allowed {limit}"


def test_statistics_need_not_be_kept():
    case = Case((2, 5, 6, 16))
    inputs = arguments(case)
    assert torch.equal(forward(case, *inputs, keep=False)[0], forward(case, *inputs)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_results_do_not_depend_on_the_order_of_threads_and_blocks(dtype):
    case = Case((3, 12, 20, 40), dtype=dtype)
    inputs = arguments(case)
    dy = torch.randn(case.shape).to(dtype)
    results = []
    for seed in range(4):
        kept = forward(case, *inputs, seed=seed)
        results.append([*kept, *backward(case, dy, kept, inputs, seed=seed)])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("wanted", range(5))
def test_a_gradient_that_nobody_needs_is_left_out(wanted):
    case = Case((2, 5, 6, 16))
    inputs = arguments(case)
    dy = torch.randn(case.shape).to(case.dtype)
    kept = forward(case, *inputs)
    everything = backward(case, dy, kept, inputs)
    needs = tuple(i == wanted for i in range(5))
    alone = backward(case, dy, kept, inputs, needs)
    assert [grad is not None for grad in alone] == list(needs)
    assert torch.equal(alone[wanted], everything[wanted])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unaligned_views_take_the_scalar_path(dtype):
    case = Case((1, 6, 9, 16), dtype=dtype)
    x, *parameters = arguments(case)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    assert shifted.data_ptr() % 16 != 0
    ours, aligned = forward(case, shifted, *parameters), forward(case, x, *parameters)
    assert all(map(torch.equal, ours, aligned))


@pytest.mark.parametrize(
    "case",
    [
        Case((2, 9, 11, 16)),
        Case((1, 1, 2, 520)),
        Case((2, 9, 11, 16), dtype=torch.float32),
        Case((2, 9, 11, 16), kernel_size=13),
    ],
    ids=str,
)
def test_every_barrier_is_needed(case):
    inputs = arguments(case)
    dy = torch.randn(case.shape).to(case.dtype)
    kept = forward(case, *inputs)
    sites = emulation.barrier_sites()
    assert sites >= 2
    for site in range(sites):
        with pytest.raises(emulation.Fault, match="race in shared memory|no thread wrote"):
            forward(case, *inputs, skipped_barrier=site)
    backward(case, dy, kept, inputs)
    sites = emulation.barrier_sites()
    assert sites >= 7
    for site in range(sites):
        with pytest.raises(emulation.Fault, match="race in shared memory|no thread wrote"):
            backward(case, dy, kept, inputs, skipped_barrier=site)
