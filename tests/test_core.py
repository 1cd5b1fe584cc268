"""The native core by itself, on NumPy arrays: every stem, dtype and instruction set.

Forward is compared with the float64 formula. Backward in float64 is compared with central
differences of that formula, and in the other dtypes with float64 on the same rounded inputs.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from convnest_kernels import _extension
from tests import core_reference as reference
from tests.core_reference import EPSILON, Core, decode, encode

if _extension.module is None:
    pytest.skip(f"no native core: {_extension.error}", allow_module_level=True)

MODULE = _extension.module
ISAS = MODULE.cpu.isas()
EPS = reference.EPS
DTYPES = ["float32", "float64", "bfloat16", "float16"]

# N, H, W, C, K: no vectors, part of one, some with a rest; maps smaller than the kernel; widths of
# exact tiles of 7 and of 4, and of neither; more rows than a ring holds; several bands and chunks.
CONV_SHAPES = [
    (1, 1, 1, 1, 3),
    (2, 1, 5, 7, 3),
    (1, 2, 1, 50, 7),
    (2, 7, 7, 50, 7),
    (1, 3, 14, 7, 5),
    (2, 9, 8, 17, 5),
    (1, 17, 12, 240, 3),
    (1, 5, 4, 16, 13),
    (3, 12, 15, 50, 7),
    (1, 16, 17, 33, 9),
    (1, 11, 21, 7, 11),
    (2, 31, 6, 20, 7),
]
SWITCHES = list(itertools.product([True, False], repeat=2))
ROW_SHAPES = [(1, 1), (3, 7), (65, 50), (1, 240), (700, 64), (131, 577)]


@pytest.fixture(params=ISAS)
def isa(request):
    before = MODULE.cpu.isa()
    MODULE.cpu.set_isa(request.param)
    yield request.param
    MODULE.cpu.set_isa(before)


def generator(*key):
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def conv_inputs(shape, dtype, none=()):
    """x, conv weight and bias, norm weight and bias, dy, as the dtype holds them; `none`: None."""
    n, h, w, c, k = shape
    rng = generator(shape)
    activations = [decode(encode(rng.standard_normal((n, h, w, c)), dtype), dtype) for _ in "xd"]
    shapes = [(c, k * k), (c,), (c,), (c,)]
    parameters = [rng.standard_normal(s) / k for s in shapes]
    parameters[3] += 2  # a bias that a kernel which pads before the norm would leave out
    kind = reference.parameter_type(dtype)
    parameters = [decode(encode(p, kind), kind) for p in parameters]
    parameters = [None if i in none else p for i, p in enumerate(parameters)]
    return activations[0], *parameters, activations[1]


def row_inputs(shape, dtype, count):
    """`count` activations, then three parameters."""
    rng = generator(shape)
    activations = [decode(encode(rng.standard_normal(shape), dtype), dtype) for _ in range(count)]
    kind = reference.parameter_type(dtype)
    parameters = [decode(encode(rng.standard_normal(shape[1]), kind), kind) for _ in range(3)]
    return [*activations, *parameters]


def assert_close(got, want, dtype, factor=8.0):
    """`factor` roundings of storage, and the sums' own, relative to the largest entry."""
    bound = factor * EPSILON[dtype] + 100 * EPSILON[reference.parameter_type(dtype)]
    error = np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)
    assert error <= bound, f"relative error {error:.2e} above {bound:.2e}"


def assert_gradients(got, want, dtype):
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert np.isfinite(g).all(), f"gradient {i}"
        if np.abs(w).max() > 1e-9:  # with one channel LayerNorm is constant: its gradients are 0
            assert_close(g, w, dtype)


def directional(function, inputs, dy, position, direction, step=1e-5):
    moved = [list(inputs), list(inputs)]
    for sign, values in zip((1, -1), moved, strict=True):
        values[position] = values[position] + sign * step * direction
    return float(((function(*moved[0]) - function(*moved[1])) * dy).sum() / (2 * step))


def assert_differences(function, inputs, dy, gradients):
    """Every gradient, along one random direction, against central differences of `function`."""
    rng = generator("directions")
    for position, gradient in enumerate(gradients):
        direction = rng.standard_normal(gradient.shape)
        want = directional(function, inputs, dy, position, direction)
        got = float((gradient * direction).sum())
        size = float(np.abs(gradient * direction).sum()) + np.abs(dy).sum() * 1e-3
        assert abs(got - want) <= 1e-6 * size, f"gradient {position}"


class TestNestedConv:
    @pytest.mark.parametrize("shape", CONV_SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shortcut", [True, False])
    def test_forward_and_backward(self, isa, shape, dtype, shortcut):
        *inputs, dv = conv_inputs(shape, dtype)
        v, grads = Core(MODULE, dtype).nested_conv(*inputs, shortcut, dv)
        assert_close(v, reference.nested_conv(*inputs, shortcut), dtype)
        MODULE.cpu.set_isa("portable")
        _, want = Core(MODULE, "float64").nested_conv(*inputs, shortcut, dv)
        assert_gradients(grads, want, dtype)

    @pytest.mark.parametrize("shape", CONV_SHAPES[1:], ids=str)
    @pytest.mark.parametrize("shortcut", [True, False])
    def test_backward_is_the_derivative(self, shape, shortcut):
        *inputs, dv = conv_inputs(shape, "float64")
        _, grads = Core(MODULE, "float64").nested_conv(*inputs, shortcut, dv)
        assert_differences(lambda *args: reference.nested_conv(*args, shortcut), inputs, dv, grads)

    @pytest.mark.parametrize("none", [(1,), (2, 3), (1, 2, 3)], ids=str)
    def test_missing_parameters(self, isa, none):
        *inputs, dv = conv_inputs(CONV_SHAPES[3], "float32", none)
        v, _ = Core(MODULE, "float32").nested_conv(*inputs, True, dv)
        assert_close(v, reference.nested_conv(*inputs, True), "float32")

    def test_nothing_kept(self, isa):
        *inputs, dv = conv_inputs(CONV_SHAPES[8], "bfloat16")
        core = Core(MODULE, "bfloat16")
        kept, _ = core.nested_conv(*inputs, True, dv)
        lean, _ = core.nested_conv(*inputs, True, dv, keep=False)
        np.testing.assert_array_equal(lean, kept)

    def test_needs(self, isa):
        *inputs, dv = conv_inputs(CONV_SHAPES[8], "float32")
        core = Core(MODULE, "float32")
        _, whole = core.nested_conv(*inputs, True, dv)
        for wanted in range(5):
            needs = [i == wanted for i in range(5)]
            _, grads = core.nested_conv(*inputs, True, dv, needs)
            np.testing.assert_array_equal(grads[wanted], whole[wanted])

    def test_a_bad_pixel_reaches_its_neighbourhood_only(self, isa):
        *inputs, dv = conv_inputs((1, 16, 16, 33, 3), "float32")
        core = Core(MODULE, "float32")
        clean, _ = core.nested_conv(*inputs, True, dv)
        for bad in (np.nan, np.inf):
            inputs[0][0, 5, 5, 7] = bad
            v, _ = core.nested_conv(*inputs, True, dv)
            inputs[0][0, 5, 5, 7] = 0
            assert np.isnan(v[0, 4:7, 4:7]).all()
            v[0, 4:7, 4:7] = clean[0, 4:7, 4:7]
            np.testing.assert_array_equal(v, clean)


class TestDwconvGeluLayernorm:
    @pytest.mark.parametrize("shape", CONV_SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("act", "norm_first"), SWITCHES)
    def test_forward_and_backward(self, isa, shape, dtype, act, norm_first):
        *inputs, dy = conv_inputs(shape, dtype)
        y, grads = Core(MODULE, dtype).dwconv_gelu_layernorm(*inputs, act, norm_first, dy)
        want_y = reference.dwconv_gelu_layernorm(*inputs, act, norm_first)
        _, want = Core(MODULE, "float64").dwconv_gelu_layernorm(*inputs, act, norm_first, dy)
        assert_close(y, want_y, dtype)
        assert_gradients(grads, want, dtype)

    @pytest.mark.parametrize("shape", CONV_SHAPES[1:], ids=str)
    @pytest.mark.parametrize(("act", "norm_first"), SWITCHES)
    def test_backward_is_the_derivative(self, shape, act, norm_first):
        *inputs, dy = conv_inputs(shape, "float64")
        _, grads = Core(MODULE, "float64").dwconv_gelu_layernorm(*inputs, act, norm_first, dy)
        assert_differences(
            lambda *args: reference.dwconv_gelu_layernorm(*args, act, norm_first),
            inputs,
            dy,
            grads,
        )

    def test_missing_parameters(self, isa):
        *inputs, dy = conv_inputs(CONV_SHAPES[3], "float32", (1, 2, 3))
        y, _ = Core(MODULE, "float32").dwconv_gelu_layernorm(*inputs, True, True, dy)
        want = reference.dwconv_gelu_layernorm(*inputs, True, True)
        assert_close(y, want, "float32")

    def test_needs(self, isa):
        *inputs, dy = conv_inputs(CONV_SHAPES[8], "float32")
        core = Core(MODULE, "float32")
        _, whole = core.dwconv_gelu_layernorm(*inputs, True, False, dy)
        for wanted in range(5):
            needs = [i == wanted for i in range(5)]
            _, grads = core.dwconv_gelu_layernorm(*inputs, True, False, dy, needs)
            np.testing.assert_array_equal(grads[wanted], whole[wanted])


class TestGeluLayernorm:
    @pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("norm_first", [True, False])
    def test_forward_and_backward(self, isa, shape, dtype, norm_first):
        x, dy, g, be, _ = row_inputs(shape, dtype, 2)
        y, grads = Core(MODULE, dtype).gelu_layernorm(x, g, be, norm_first, dy)
        assert_close(y, reference.gelu_layernorm(x, g, be, norm_first), dtype)
        _, want = Core(MODULE, "float64").gelu_layernorm(x, g, be, norm_first, dy)
        assert_gradients(grads, want, dtype)
        if dtype == "float64" and shape[1] > 1:
            assert_differences(
                lambda *args: reference.gelu_layernorm(*args, norm_first), (x, g, be), dy, grads
            )

    def test_needs(self, isa):
        x, dy, g, be, _ = row_inputs((65, 50), "float32", 2)
        core = Core(MODULE, "float32")
        _, whole = core.gelu_layernorm(x, g, be, False, dy)
        for wanted in range(3):
            _, grads = core.gelu_layernorm(x, g, be, False, dy, [i == wanted for i in range(3)])
            np.testing.assert_array_equal(grads[wanted], whole[wanted])


class TestLayernormResidual:
    @pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_forward_and_backward(self, isa, shape, dtype):
        t, x, dy, g, be, scale = row_inputs(shape, dtype, 3)
        y, grads = Core(MODULE, dtype).layernorm_residual(t, x, g, be, scale, dy)
        assert_close(y, reference.layernorm_residual(t, x, g, be, scale), dtype)
        _, want = Core(MODULE, "float64").layernorm_residual(t, x, g, be, scale, dy)
        assert_gradients(grads, want, dtype)
        if dtype == "float64" and shape[1] > 1:
            inputs = (t, x, g, be, scale)
            order = [grads[i] for i in range(5)]
            assert_differences(reference.layernorm_residual, inputs, dy, order)

    def test_needs(self, isa):
        t, x, dy, g, be, scale = row_inputs((65, 50), "float32", 3)
        core = Core(MODULE, "float32")
        _, whole = core.layernorm_residual(t, x, g, be, scale, dy)
        for wanted in range(5):
            needs = [i == wanted for i in range(5)]
            _, grads = core.layernorm_residual(t, x, g, be, scale, dy, needs)
            np.testing.assert_array_equal(grads[wanted], whole[wanted])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_conversions_round_to_nearest_even(isa, dtype):
    """y = scale x + LN(t) with a norm of 0: only the load, the product and the store act."""
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    x = bits if dtype == "bfloat16" else bits.view(np.float16)
    with np.errstate(invalid="ignore"):
        values = decode(x, dtype)
    rows = x.reshape(256, 256)
    zeros, y = np.zeros_like(rows), np.zeros_like(rows)
    no_norm = np.zeros(256, np.float32)
    scale = np.full(256, 1 + 2.0**-8 + 2.0**-11, np.float32)
    MODULE.cpu.layernorm_residual_forward(
        *(a.ctypes.data for a in (zeros, rows, no_norm, no_norm, scale, y)),
        *(0, 0, 256, 256, EPS, getattr(MODULE, dtype)),
    )
    with np.errstate(over="ignore", invalid="ignore"):
        product = values.astype(np.float32) * scale[0]
        want = decode(encode(np.where(np.isnan(product), 0, product), dtype), dtype)
    got = decode(y.reshape(-1), dtype)
    nan = np.isnan(values)
    assert np.isnan(got[nan]).all()
    np.testing.assert_array_equal(got[~nan], want[~nan])


OWN_POOL = """
import hashlib, importlib.util, sys, threading
spec = importlib.util.spec_from_file_location("_C", {path!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
sys.path.insert(0, {tests!r})
import numpy as np
import core_reference as reference

def digest():
    core, result = reference.Core(module, "float32"), hashlib.sha256()
    for shape in [(5, 30, 16, 50, 7), (1, 9, 7, 33, 3)]:
        rng = np.random.default_rng(1)
        n, h, w, c, k = shape
        x, dy = (rng.standard_normal((n, h, w, c)) for _ in range(2))
        p = [rng.standard_normal(s) for s in [(c, k * k), c, c, c]]
        calls = [
            core.nested_conv(x, *p, True, dy),
            core.dwconv_gelu_layernorm(x, *p, True, False, dy),
            core.gelu_layernorm(x.reshape(-1, c), *p[2:], False, dy.reshape(-1, c)),
            core.layernorm_residual(*[x.reshape(-1, c)] * 2, *p[1:], dy.reshape(-1, c)),
        ]
        for y, grads in calls:
            for array in (y, *grads):
                result.update(array.tobytes())
    return result.hexdigest()

for isa in module.cpu.isas():
    module.cpu.set_isa(isa)
    digests = set()
    for threads in (1, 2, 3, 8):
        module.cpu.set_num_threads(threads)
        assert module.cpu.num_threads() == threads
        digests |= {{digest(), digest()}}
    callers = [threading.Thread(target=lambda: digests.add(digest())) for _ in range(4)]
    for caller in callers: caller.start()
    for caller in callers: caller.join()
    assert len(digests) == 1, (isa, digests)
print("same bits")
"""


def test_same_bits_on_any_number_of_threads_without_torch():
    script = OWN_POOL.format(path=MODULE.__file__, tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "same bits"


class TestRefusals:
    NAMES = "h conv_weight conv_bias ln_weight ln_bias v u mean rstd N H W C"
    CONV = dict.fromkeys(NAMES.split(), 0)

    @pytest.mark.parametrize("size", [0, 1, 4, 15, -3])
    def test_kernel_size(self, size):
        with pytest.raises(ValueError, match=f"K must be one of 3, 5, 7, 9, 11, 13, got {size}"):
            MODULE.cpu.nested_conv_forward(
                **self.CONV, K=size, eps=EPS, shortcut=True, dtype=MODULE.float32
            )

    def test_dtype(self):
        with pytest.raises(ValueError, match=r"dtype must be one of .*, got 9"):
            MODULE.cpu.nested_conv_forward(**self.CONV, K=7, eps=EPS, shortcut=True, dtype=9)

    def test_isa(self):
        with pytest.raises(ValueError, match=f"isa must be one of {', '.join(ISAS)}, got mmx"):
            MODULE.cpu.set_isa("mmx")

    def test_num_threads_with_torchs_pool(self):
        if not _extension.shares_torch_threads:
            pytest.skip("torch's pool is not in use")
        with pytest.raises(RuntimeError, match=r"torch\.set_num_threads"):
            MODULE.cpu.set_num_threads(2)

    def test_half_a_thread_pool(self):
        with pytest.raises(ValueError, match="give both addresses"):
            MODULE.cpu.use_thread_pool(1, 0)
