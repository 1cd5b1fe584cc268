"""GELU and its derivative in the native core against float64, with the bounds of gelu.h."""

from __future__ import annotations

import numpy as np
import pytest

from convnest_kernels import _extension
from tests import core_reference as reference
from tests.core_reference import decode, encode

if _extension.module is None:
    pytest.skip(f"no native core: {_extension.error}", allow_module_level=True)

MODULE = _extension.module
ISAS = MODULE.cpu.isas()


@pytest.fixture(params=ISAS)
def isa(request):
    before = MODULE.cpu.isa()
    MODULE.cpu.set_isa(request.param)
    yield request.param
    MODULE.cpu.set_isa(before)


EPS = 2.0**-23
# What gelu.h states: of GELU relative to it, of GELU' relative to Phi(x) + |x| phi(x).
GELU_BOUNDS = {
    "float32": (2 * EPS, 2.3 * EPS),
    "bfloat16": (3e-5, 1.5e-4),
    "float16": (3e-5, 1.5e-4),
}


@pytest.mark.parametrize("dtype", list(GELU_BOUNDS))
class TestGelu:
    """In float32 for every dtype: as a mean over one channel, and as the gradient of a bias."""

    @staticmethod
    def inputs(dtype):
        """A sweep of values that the dtype holds, and their array in it."""
        dense = [np.linspace(-14, 14, 400_001), np.linspace(-0.02, 0.02, 400_001), [-0.0]]
        given = encode(np.concatenate(dense), dtype)
        return decode(given, dtype), given

    def test_value(self, isa, dtype):
        x, given = self.inputs(dtype)
        y, mean = np.empty_like(given), np.full(len(x), np.nan, np.float32)
        MODULE.cpu.gelu_layernorm_forward(
            given.ctypes.data, 0, 0, y.ctypes.data, mean.ctypes.data, 0, len(x), 1, reference.EPS,
            False, getattr(MODULE, dtype),
        )  # fmt: skip
        exact = reference.gelu(x)
        error = np.abs(mean - exact)
        relative = x >= -10
        assert (error[relative] <= GELU_BOUNDS[dtype][0] * np.abs(exact[relative])).all()
        assert (error[~relative] <= 1e-22).all()
        if dtype == "float32":
            assert (error <= 0.8 * EPS * np.maximum(1, np.abs(x))).all()

    def test_grad(self, isa, dtype):
        u, given = self.inputs(dtype)
        ones = encode(np.ones(len(u)), dtype)
        zero, grad = np.zeros(1, np.float32), np.full(len(u), np.nan, np.float32)
        # A norm of rstd 0 first, so that GELU is of its bias.
        bias = u.astype(np.float32)
        inputs = [a.ctypes.data for a in (ones, given, zero, zero)]
        MODULE.cpu.gelu_layernorm_backward(
            *inputs, 0, bias.ctypes.data, 0, 0, grad.ctypes.data, 1, len(u), True,
            getattr(MODULE, dtype),
        )  # fmt: skip
        below = reference.gelu(u) / np.where(u == 0, 1, u) + 0.5 * (u == 0)
        error = np.abs(grad - reference.gelu_grad(u))
        relative = u >= -10
        scale = below + np.abs(reference.gelu_grad(u) - below)
        assert (error[relative] <= GELU_BOUNDS[dtype][1] * scale[relative]).all()
        assert (error[~relative] <= 1e-21).all()
        if dtype == "float32":
            assert error.max() <= 1.3 * EPS

    def test_limits(self, isa, dtype):
        given = encode(np.array([np.inf, -np.inf, np.nan, -60000, 60000]), dtype)
        y, mean = np.empty_like(given), np.empty(5, np.float32)
        MODULE.cpu.gelu_layernorm_forward(
            given.ctypes.data, 0, 0, y.ctypes.data, mean.ctypes.data, 0, 5, 1, reference.EPS,
            False, getattr(MODULE, dtype),
        )  # fmt: skip
        last = decode(given, dtype)[4]
        np.testing.assert_array_equal(mean, [np.inf, np.nan, np.nan, 0, last])
