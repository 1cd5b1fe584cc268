"""The convolutions of small maps, where the image is the tile, on the host emulation.

Their numbers over the shared case table: test_cuda_nested_conv.py and its neighbours, whose maps of
up to 8×8 run here. This file holds what is particular: which shapes, and the tile's edges.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from tests import emulation
from tests import test_cuda_dwconv_gelu_layernorm as plain
from tests import test_cuda_nested_conv as nested

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))

FAULT = "race in shared memory|no thread wrote"


def takes(N: int, H: int, W: int, kernel_size: int) -> bool:
    return bool(emulation.library().takes_small_map(N, H, W, kernel_size))


CASES = [
    # One tile, a tile and one image, channels of one and a half blocks
    nested.Case((16, 7, 7, 16)),
    nested.Case((17, 7, 7, 24), dtype=torch.float16, seed=3),
    nested.Case((1, 7, 7, 40), seed=1),
    # Maps of other sizes, with every kernel size
    nested.Case((16, 8, 8, 16)),
    nested.Case((16, 3, 8, 8), seed=0),
    nested.Case((16, 8, 1, 8), kernel_size=3),
    nested.Case((16, 7, 2, 24), kernel_size=5, dtype=torch.float16),
    nested.Case((16, 1, 5, 8), kernel_size=9),
    nested.Case((18, 8, 7, 16), kernel_size=9, shortcut=False),
    nested.Case((16, 6, 2, 16), kernel_size=11, affine=False, bias=False),
    nested.Case((5, 8, 8, 24), kernel_size=13, dtype=torch.float16),
    nested.Case((9, 7, 7, 8), kernel_size=13),
]


def plain_case(case: nested.Case) -> plain.Case:
    return plain.Case(case.shape, case.kernel_size, case.dtype, gelu=False, seed=case.seed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case: nested.Case) -> None:
    assert takes(*case.shape[:3], case.kernel_size)
    nested.test_forward(case)
    nested.test_backward(case)
    plain.test_forward_and_backward(plain_case(case))


@pytest.mark.slow
def test_blocks_that_take_several_tiles() -> None:
    case = nested.Case((80, 1, 5, 8192), kernel_size=9)
    assert emulation.library().small_map_groups(case.shape[0], case.shape[3]) == 4
    plain.test_forward_and_backward(plain_case(case))


@pytest.mark.parametrize("kernel_size", [5, 7, 9, 13])
def test_every_size_of_map(kernel_size: int) -> None:
    sizes = [size for size in product(range(1, 9), repeat=2) if takes(16, *size, kernel_size)]
    assert len(sizes) > 15
    for H, W in sizes:
        plain.test_forward_and_backward(plain.Case((16, H, W, 8), kernel_size, gelu=False))


@pytest.mark.parametrize(
    ("shape", "kernel_size", "small"),
    [
        # The last stage at 224², at any batch; at 256² and 192²
        ((128, 7, 7), 7, True),
        ((1, 7, 7), 7, True),
        ((128, 8, 8), 7, True),
        ((128, 6, 6), 7, True),
        # So narrow that more images stand side by side on the canvas than in a tile
        ((128, 7, 1), 7, False),
        ((128, 4, 4), 3, False),
        # One image beyond the tile, one pixel beyond the side
        ((17, 7, 4), 7, False),
        ((128, 9, 7), 7, False),
        ((128, 7, 9), 7, False),
        # Against the FMA units
        ((128, 7, 7), 13, True),
        ((2, 7, 7), 13, False),
        ((0, 7, 7), 7, False),
    ],
)
def test_which_shapes(shape: tuple[int, int, int], kernel_size: int, small: bool) -> None:
    assert takes(*shape, kernel_size) == small


def results(case: nested.Case, **faults: object) -> list[Tensor | None]:
    torch.manual_seed(0)
    inputs = nested.arguments(case)
    dv = torch.randn(case.shape).to(case.dtype)
    kept = nested.forward(case, *inputs, **faults)
    return [*kept, *nested.backward(case, dv, kept, inputs, **faults)]


def test_results_do_not_depend_on_the_order_of_threads_and_blocks() -> None:
    case = nested.Case((33, 7, 7, 24))
    first = results(case, seed=0)
    for seed in (1, 2, 3):
        assert all(map(torch.equal, results(case, seed=seed), first))


@pytest.mark.parametrize("wanted", range(5))
@pytest.mark.parametrize("of", [nested, plain], ids=["nested_conv", "dwconv_gelu_layernorm"])
def test_a_gradient_that_nobody_needs_is_left_out(of: object, wanted: int) -> None:
    case = of.Case((3, 7, 7, 16))
    inputs = of.arguments(case)
    dy = torch.randn(case.shape).to(case.dtype)
    kept = of.forward(case, *inputs)
    needs = tuple(i == wanted for i in range(5))
    alone = of.backward(case, dy, kept, inputs, needs)
    assert [grad is not None for grad in alone] == list(needs)
    assert torch.equal(alone[wanted], of.backward(case, dy, kept, inputs)[wanted])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 100.0])
def test_an_image_does_not_reach_its_neighbours(value: float) -> None:
    """In all of the image, and nowhere else: 0·∞ of the band does not leave the tile's row."""
    case = nested.Case((6, 7, 7, 16))
    inputs = nested.arguments(case)
    v = nested.forward(case, *inputs)[0]
    inputs[0][2, 3, 3, 5] = value
    changed = nested.forward(case, *inputs)[0]
    others = [0, 1, 3, 4, 5]
    assert torch.equal(v[others], changed[others])
    assert not torch.equal(v[2], changed[2])


@pytest.mark.parametrize(
    "case",
    [nested.Case((3, 7, 7, 16)), nested.Case((5, 8, 8, 8), kernel_size=13)],
    ids=str,
)
def test_every_barrier_is_needed(case: nested.Case) -> None:
    inputs = nested.arguments(case)
    dv = torch.randn(case.shape).to(case.dtype)
    kept = nested.forward(case, *inputs)
    sites = emulation.barrier_sites()
    assert sites >= 4
    for site in range(sites):
        with pytest.raises(emulation.Fault, match=FAULT):
            nested.forward(case, *inputs, skipped_barrier=site)
    nested.backward(case, dv, kept, inputs)
    sites = emulation.barrier_sites()
    assert sites >= 7
    for site in range(sites):
        with pytest.raises(emulation.Fault, match=FAULT):
            nested.backward(case, dv, kept, inputs, skipped_barrier=site)


def test_what_no_16_byte_access_may_touch_runs_elsewhere() -> None:
    """The same call unaligned, and with 12 channels of 16: other kernels, the same numbers."""
    case = nested.Case((3, 7, 7, 16))
    h, *parameters = inputs = nested.arguments(case)
    shifted = torch.empty(h.numel() + 1, dtype=h.dtype)[1:].view(h.shape).copy_(h)
    kept = nested.forward(case, *inputs)
    other = nested.forward(case, shifted, *parameters)
    rounding = torch.finfo(case.dtype).eps
    torch.testing.assert_close(kept[0], other[0], rtol=2 * rounding, atol=rounding)
    few = [h[..., :12].contiguous(), *(t[:12].contiguous() for t in parameters)]
    twelve = nested.Case((3, 7, 7, 12))
    assert math.prod(twelve.shape) % 8 == 4
    nested.test_forward(twelve)
    assert nested.forward(twelve, *few)[0].isfinite().all()
