"""nested_conv's CUDA kernels on the host emulation, against the eager formula in float64."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from convnest_kernels.reference.nested_conv import backward as eager_backward_of
from convnest_kernels.reference.nested_conv import forward as eager_forward_of
from tests import emulation
from tests.tolerances import assert_accurate, assert_statistics, bound

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))

EPS = 1e-6


class FwdParams(emulation.Params):
    _fields_ = emulation.fields(
        "h conv_weight conv_bias ln_weight ln_bias v u mean rstd",
        "N H W C",
        ("eps", ctypes.c_float),
        ("shortcut", ctypes.c_bool),
    )


class BwdParams(emulation.Params):
    _fields_ = emulation.fields(
        "dv h u mean rstd conv_weight ln_weight ln_bias "
        "dh dconv_weight dconv_bias dln_weight dln_bias workspace",
        "N H W C",
        ("shortcut", ctypes.c_bool),
    )
    outputs = ("dh", "dconv_weight", "dconv_bias", "dln_weight", "dln_bias")


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: shape, kernel size and what is left out."""

    shape: tuple[int, int, int, int]
    kernel_size: int = 7
    dtype: torch.dtype = torch.bfloat16
    shortcut: bool = True
    affine: bool = True
    bias: bool = True
    keep: bool = True
    seed: int = 2

    def __str__(self) -> str:
        options = [f"{'x'.join(map(str, self.shape))}-k{self.kernel_size}"]
        options += [str(self.dtype).removeprefix("torch.")]
        for name in ("shortcut", "affine", "bias", "keep"):
            options += [] if getattr(self, name) else [f"no_{name}"]
        return "-".join([*options, str(self.seed)])


CASES = [
    # Several images beside and below each other, channels of one and a half blocks
    Case((13, 9, 7, 24)),
    Case((3, 14, 14, 16), dtype=torch.float16),
    Case((2, 28, 28, 32), seed=0),
    Case((2, 9, 56, 16), seed=1),
    # Images cut into parts; parts of unequal height
    Case((1, 61, 9, 8), seed=3),
    # Strips: one pixel more than the canvas, two and a half strips
    Case((1, 3, 125, 16)),
    Case((2, 5, 301, 8), dtype=torch.float16),
    # Smaller than the kernel, a single pixel, a single row, a single column
    Case((2, 2, 3, 16)),
    Case((5, 1, 1, 8)),
    Case((3, 1, 124, 8)),
    Case((70, 4, 1, 8)),
    # Channels that no 16-byte access divides
    Case((2, 6, 5, 1)),
    Case((2, 8, 10, 13), dtype=torch.float16),
    Case((1, 9, 9, 20)),
    # Wide rows: statistics by 2, 4 and 8 warps, and beyond what registers hold
    Case((1, 2, 2, 1056)),
    Case((1, 1, 3, 3456)),
    Case((1, 1, 2, 8192)),
    # The other kernel sizes
    Case((2, 10, 11, 16), kernel_size=3),
    Case((7, 1, 1, 8), kernel_size=3),
    Case((2, 10, 11, 16), kernel_size=5, dtype=torch.float16),
    Case((6, 1, 3, 24), kernel_size=5),
    Case((2, 10, 130, 8), kernel_size=9),
    Case((2, 17, 11, 13), kernel_size=9, dtype=torch.float16),
    # On the FMA units: float32, and sizes that the band does not fit
    Case((9, 7, 7, 40), dtype=torch.float32),
    Case((2, 9, 31, 32), dtype=torch.float32, seed=0),
    Case((1, 37, 65, 5), dtype=torch.float32, seed=1),
    Case((3, 1, 1, 24), dtype=torch.float32, kernel_size=3),
    Case((2, 6, 9, 33), dtype=torch.float32, kernel_size=5, shortcut=False, seed=3),
    Case((2, 6, 10, 8), dtype=torch.float32, kernel_size=9, affine=False, bias=False),
    Case((1, 8, 11, 12), dtype=torch.float32, kernel_size=11),
    Case((1, 14, 9, 4), dtype=torch.float32, kernel_size=13),
    Case((2, 9, 12, 24), kernel_size=11),
    Case((1, 13, 30, 7), kernel_size=13, dtype=torch.float16),
    # Options
    Case((2, 9, 9, 16), shortcut=False),
    Case((2, 9, 9, 16), affine=False, bias=False),
    Case((2, 9, 9, 16), keep=False),
    Case((2, 9, 9, 12), shortcut=False, affine=False, bias=False, keep=False),
]


# Blocks of the weight gradient that take several items: only with so many channels
MANY_ITEMS = Case((1, 1, 250, 4736))
# The same on the FMA units, of both kernels
MANY_STRIPS = Case((129, 1, 2, 4096), dtype=torch.float32)


# What a block can have on data-centre chips since sm_90 (two kernels, stages overlapped), on sm_80,
# on the rest (two kernels without prefetch), on none: there backward runs in three wide kernels.
TWO_KERNELS, TWO_KERNELS_AHEAD, TWO_KERNELS_TIGHT = 227 * 1024, 163 * 1024, 99 * 1024
THREE_KERNELS = 96 * 1024


@pytest.fixture(
    params=[TWO_KERNELS, TWO_KERNELS_AHEAD, TWO_KERNELS_TIGHT, THREE_KERNELS],
    ids=["two", "two_ahead", "two_tight", "three"],
)
def either_device(request: pytest.FixtureRequest) -> Iterator[int]:
    with emulation.device(request.param):
        yield request.param


def takes_two_kernels(case: Case) -> bool:
    sizes = case.kernel_size <= 7 and case.shape[-1] % 8 == 0
    return sizes and case.dtype != torch.float32


def arguments(case: Case) -> tuple[Tensor, ...]:
    """Random h and parameters (float32) of a case."""
    C, k = case.shape[-1], case.kernel_size
    h = torch.randn(case.shape).to(case.dtype)
    conv_weight = torch.randn(C, 1, k, k) / k
    conv_bias = torch.randn(C) if case.bias else None
    ln_weight, ln_bias = (torch.randn(C), torch.randn(C)) if case.affine else (None, None)
    return h, conv_weight, conv_bias, ln_weight, ln_bias


def forward(case: Case, *inputs: Tensor | None, **faults: object) -> tuple[Tensor, ...]:
    h = inputs[0]
    names = ("h", "conv_weight", "conv_bias", "ln_weight", "ln_bias")
    poisoned = {
        "v": torch.full_like(h, torch.nan),
        "u": torch.full_like(h, torch.nan) if case.keep else None,
        "mean": torch.full(h.shape[:-1], torch.nan),
        "rstd": torch.full(h.shape[:-1], torch.nan),
    }
    tensors = dict(zip(names, inputs, strict=True))
    N, H, W, C = h.shape
    params = FwdParams.of(
        **tensors, **poisoned, N=N, H=H, W=W, C=C, eps=EPS, shortcut=case.shortcut
    )
    emulation.run(
        "nested_conv_fwd",
        ctypes.byref(params),
        case.kernel_size,
        emulation.TYPES.index(case.dtype),
        inputs=tensors,
        outputs=poisoned,
        **{"seed": case.seed, **faults},
    )
    return tuple(poisoned.values())


def backward(
    case: Case,
    dv: Tensor,
    kept: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    needs: tuple[bool, ...] = (True,) * 5,
    **faults: object,
) -> tuple[Tensor | None, ...]:
    h, conv_weight, _, ln_weight, ln_bias = inputs
    _, u, mean, rstd = kept
    N, H, W, C = h.shape
    type_of = emulation.TYPES.index(case.dtype)
    poisoned = {
        name: torch.full(shape, torch.nan, dtype=dtype) if need else None
        for name, need, shape, dtype in zip(
            BwdParams.outputs,
            needs,
            (h.shape, conv_weight.shape, (C,), (C,), (C,)),
            (h.dtype, *[torch.float32] * 4),
            strict=True,
        )
    }
    tensors = dict(
        dv=dv, h=h, u=u, mean=mean, rstd=rstd,
        conv_weight=conv_weight, ln_weight=ln_weight, ln_bias=ln_bias,
    )  # fmt: skip
    params = BwdParams.of(
        **tensors, **poisoned, workspace=0, N=N, H=H, W=W, C=C, shortcut=case.shortcut
    )
    lib = emulation.library()
    lib.nested_conv_bwd_workspace.restype = ctypes.c_size_t
    size = lib.nested_conv_bwd_workspace(ctypes.byref(params), case.kernel_size, type_of)
    workspace = torch.full((size // 4,), torch.nan)
    params.workspace = workspace.data_ptr()
    emulation.run(
        "nested_conv_bwd",
        ctypes.byref(params),
        case.kernel_size,
        type_of,
        inputs=tensors,
        outputs={**poisoned, "workspace": workspace},
        **{"seed": case.seed, **faults},
    )
    return tuple(poisoned.values())


def eager_backward(
    case: Case, dv: Tensor, kept: tuple[Tensor, ...], inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    h, *parameters = inputs
    return eager_backward_of(
        dv, h, kept[1], kept[2], kept[3], *parameters, EPS, case.shortcut, (True,) * 5
    )


def eager_forward(case: Case, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    return eager_forward_of(*inputs, EPS, case.shortcut, True)


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def test_params_have_the_cores_layout():
    lib = emulation.library()
    assert lib.nested_conv_fwd_params_bytes() == ctypes.sizeof(FwdParams)
    assert lib.nested_conv_bwd_params_bytes() == ctypes.sizeof(BwdParams)


@pytest.mark.parametrize(
    "case", [*CASES, pytest.param(MANY_STRIPS, marks=pytest.mark.slow)], ids=str
)
def test_forward(case):
    inputs = arguments(case)
    ours = forward(case, *inputs)
    truth = eager_forward(case, *double(*inputs))
    low = [None if t is None else t.to(case.dtype) for t in inputs]
    eager = eager_forward(case, *low)
    for name, mine, theirs, true in zip("vu", ours[:2], eager[:2], truth[:2], strict=True):
        if mine is not None:
            assert_accurate(name, mine, theirs, true)
    assert_statistics(*ours[2:], *truth[2:], case.dtype)


@pytest.mark.parametrize(
    "case",
    [
        *(case for case in CASES if case.keep),
        *(pytest.param(case, marks=pytest.mark.slow) for case in (MANY_ITEMS, MANY_STRIPS)),
    ],
    ids=str,
)
def test_backward(case):
    check_backward(case)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.keep and takes_two_kernels(case)], ids=str
)
def test_backward_in_three_kernels(case):
    with emulation.device(THREE_KERNELS):
        check_backward(case)


def check_backward(case):
    inputs = arguments(case)
    dv = torch.randn(case.shape).to(case.dtype)
    ours = backward(case, dv, forward(case, *inputs), inputs)
    wide, low = double(*inputs), [None if t is None else t.to(case.dtype) for t in inputs]
    truth = eager_backward(case, dv.double(), eager_forward(case, *wide), wide)
    eager = eager_backward(case, dv, eager_forward(case, *low), low)
    assert_accurate("dh", ours[0], eager[0], truth[0])
    # A parameter's gradient sums a term of the order of 1 for each pixel, made of values rounded to
    # the activations' type; eager's own error is a small sample where there are few channels.
    rounding = torch.finfo(case.dtype).eps * math.sqrt(math.prod(case.shape[:-1])) / 2
    for name, mine, theirs, true in list(zip(BwdParams.outputs, ours, eager, truth, strict=True))[
        1:
    ]:
        assert mine.isfinite().all(), name
        error = (mine.double() - true).abs().max().item()
        assert error <= bound(theirs, true) + rounding, f"{name} is off by {error}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_results_do_not_depend_on_the_order_of_threads_and_blocks(dtype, either_device):
    case = Case((3, 20, 50, 40), dtype=dtype)
    inputs = arguments(case)
    dv = torch.randn(case.shape).to(case.dtype)
    results = []
    for seed in range(4):
        kept = forward(case, *inputs, seed=seed)
        results.append([*kept, *backward(case, dv, kept, inputs, seed=seed)])
    for result in results[1:]:
        for mine, first in zip(result, results[0], strict=True):
            assert torch.equal(mine, first)


@pytest.mark.parametrize("wanted", range(5))
def test_a_gradient_that_nobody_needs_is_left_out(wanted, either_device):
    case = Case((2, 5, 6, 16))
    inputs = arguments(case)
    dv = torch.randn(case.shape).to(case.dtype)
    kept = forward(case, *inputs)
    everything = backward(case, dv, kept, inputs)
    needs = tuple(i == wanted for i in range(5))
    alone = backward(case, dv, kept, inputs, needs)
    assert [grad is not None for grad in alone] == list(needs)
    assert torch.equal(alone[wanted], everything[wanted])


def test_unaligned_views_take_the_scalar_path():
    case = Case((1, 6, 9, 16))
    h, *parameters = arguments(case)
    shifted = torch.empty(h.numel() + 1, dtype=h.dtype)[1:].view(h.shape).copy_(h)
    assert shifted.data_ptr() % 16 != 0
    kept = forward(case, h, *parameters)
    for mine, aligned in zip(forward(case, shifted, *parameters), kept, strict=True):
        assert torch.equal(mine, aligned)
    # Backward of an unaligned view runs in three kernels, also where two would fit.
    dv = torch.randn(case.shape).to(case.dtype)
    ours = backward(case, dv, kept, (shifted, *parameters))
    with emulation.device(THREE_KERNELS):
        three = backward(case, dv, kept, (h, *parameters))
    for mine, aligned in zip(ours, three, strict=True):
        assert torch.equal(mine, aligned)


def test_gaps_and_halos_keep_other_images_out():
    case = Case((6, 5, 7, 16))
    inputs = arguments(case)
    v = forward(case, *inputs)[0]
    inputs[0][2] = 100.0
    changed = forward(case, *inputs)[0]
    others = [0, 1, 3, 4, 5]
    assert torch.equal(v[others], changed[others])


@pytest.mark.parametrize("shape", [(2, 9, 11, 16), (1, 2, 1, 1056)])
def test_every_barrier_of_forward_is_needed(shape):
    case = Case(shape)
    inputs = arguments(case)
    forward(case, *inputs)
    sites = emulation.barrier_sites()
    assert sites >= 5
    for site in range(sites):
        with pytest.raises(emulation.Fault, match="race in shared memory|no thread wrote"):
            forward(case, *inputs, skipped_barrier=site)


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
def test_every_barrier_of_backward_is_needed(case, either_device):
    if either_device != TWO_KERNELS and not takes_two_kernels(case):
        pytest.skip("it runs in three kernels on every device")
    if either_device in (TWO_KERNELS, TWO_KERNELS_TIGHT) and case.shape[1] <= 4:
        pytest.skip("a single stage has no drain before its fill, nor a fetch behind it")
    inputs = arguments(case)
    dv = torch.randn(case.shape).to(case.dtype)
    kept = forward(case, *inputs)
    backward(case, dv, kept, inputs)
    sites = emulation.barrier_sites()
    assert sites >= 8
    for site in range(sites):
        with pytest.raises(emulation.Fault, match="race in shared memory|no thread wrote"):
            backward(case, dv, kept, inputs, skipped_barrier=site)


def test_kernel_size_without_a_kernel_is_refused():
    case = Case((1, 5, 5, 8), kernel_size=15)
    with pytest.raises(emulation.Fault, match="kernel_size must be 3, 5, 7, 9, 11 or 13, got 15"):
        forward(case, *arguments(case))
