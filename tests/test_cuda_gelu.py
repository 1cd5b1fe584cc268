"""GELU and its derivative of the CUDA kernels, at every number of bfloat16 and float16."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch import Tensor

from tests import emulation
from tests.tolerances import GELU_TAIL_ERROR

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))

# Of Q/φ − x in the derivative (csrc/common/gelu.cuh), relative to it or to 0.1
SLOPE_ERROR = {torch.bfloat16: 2.5e-4, torch.float16: 4.1e-5}
# Roundings of float, in the exponent of 2 (up to 130) above all
FLOAT = 2e-5
# Up to here the fits hold; beyond, what they give is this small.
LARGEST, NOTHING = 6.0, 1e-8


def of_every_number(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All x but NaN and infinities, GELU(x), GELU'(x), and GELU'(x) from the tail of GELU(x)."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    gelu, slope, both = torch.empty(1 << 16), torch.empty(1 << 16), torch.empty(2, 1 << 16)
    x, *found = [ctypes.c_void_p(t.data_ptr()) for t in (bits, gelu, slope, both)]
    emulation.library().gelu(x, 1 << 16, emulation.TYPES.index(dtype), *found)
    numbers = bits.view(dtype).double()
    kept = numbers.isfinite()
    for values in (gelu, slope, both[1]):
        assert values[numbers.isnan()].isnan().all()
    assert torch.equal(both[0][kept], gelu[kept])
    return numbers[kept], gelu[kept].double(), slope[kept].double(), both[1][kept].double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gelu(dtype):
    x, gelu, *_ = of_every_number(dtype)
    magnitude = x.abs()
    tail = magnitude * torch.special.erfc(magnitude / math.sqrt(2)) / 2
    error = (gelu - (x.clamp(min=0) - tail)).abs()
    held = magnitude <= LARGEST
    rounding = torch.finfo(torch.float32).eps * magnitude
    assert (error <= GELU_TAIL_ERROR[dtype] * 1.01 * tail + rounding)[held].all()
    assert (error <= NOTHING + rounding)[~held].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_derivative_of_gelu(dtype):
    x, _, slope, beside = of_every_number(dtype)
    magnitude = x.abs()
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    tail = torch.special.erfc(magnitude / math.sqrt(2)) / 2
    below = tail - magnitude * density  # GELU' of −|x|
    truth = torch.where(x < 0, below, 1 - below)
    factor = (below / density.clamp(min=1e-300)).abs()
    factor = torch.where(magnitude < 13, factor, magnitude)
    allowed = (SLOPE_ERROR[dtype] * 1.01 + FLOAT) * density * factor.clamp(min=0.1)
    assert ((slope - truth).abs() <= allowed + torch.finfo(torch.float32).eps)[x >= 0].all()
    assert ((slope - truth).abs() <= allowed + 1e-37)[x < 0].all()
    # Made beside GELU it is off by the tail's error.
    allowed = GELU_TAIL_ERROR[dtype] * 1.01 * tail + FLOAT * density * magnitude
    held = magnitude <= LARGEST
    error = (beside - truth).abs()
    assert (error <= allowed + torch.finfo(torch.float32).eps)[held].all()
    assert (error <= 1e-7)[~held].all()
