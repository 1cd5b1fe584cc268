"""Every backend × operator × dtype, forward and all gradients, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.cases import CASES, CONV_OPERATORS, OPERATORS, OPTIONS, Case, Inputs, make_inputs
from tests.conftest import BACKENDS, CPU_ISAS
from tests.tolerances import assert_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DEFAULTS: dict[str, dict[str, object]] = {
    "nested_conv": {"shortcut": True},
    "dwconv_gelu_layernorm": {"activation": "gelu", "norm_first": False},
    "gelu_layernorm": {"norm_first": False},
    "layernorm_residual": {},
}
each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def output_and_gradients(
    function: Callable[..., Tensor], inputs: Inputs, **options: object
) -> dict[str, Tensor]:
    y = function(*inputs.args, **inputs.kwargs, **options)
    grads = torch.autograd.grad(y, inputs.wanted, inputs.dy.to(y.dtype))
    names = [name for name, tensor in inputs.tensors.items() if tensor is not None]
    return {"y": y} | {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}


def largest_rstd(case: Case, inputs: Inputs) -> float:
    """The largest 1/√(var + eps) of the LayerNorm, which multiplies what was rounded before it."""
    forward = getattr(torch.ops.convnest, f"{case.operator}_forward")
    options = DEFAULTS[case.operator] | case.kwargs
    args = [None if x is None else x.detach() for x in inputs.to(torch.float64).args]
    *_, rstd = forward(*args, **options, eps=1e-6, keep=True, backend="eager")
    return rstd.max().item()


def check(case: Case, inputs: Inputs, backend: str) -> None:
    truth = output_and_gradients(case.formula, inputs.to(torch.float64))
    eager = output_and_gradients(case.formula, inputs)
    ours = output_and_gradients(case.function, inputs, backend=backend)
    rows, rstd = math.prod(case.shape[:-1]), largest_rstd(case, inputs)
    for name, tensor in ours.items():
        wide = name == "y" or inputs.tensors[name[1:]].shape == case.shape  # type: ignore[union-attr]
        assert_accurate(name, tensor, eager[name], truth[name], 1 if wide else rows, rstd)


def check_each_gradient_alone(case: Case, inputs: Inputs, backend: str) -> None:
    """Each gradient, asked for by itself, is the one that comes with all the others."""
    everything = output_and_gradients(case.function, inputs, backend=backend)
    for name, tensor in inputs.tensors.items():
        assert tensor is not None
        for other in inputs.wanted:
            other.requires_grad_(other is tensor)
        y = case.function(*inputs.args, backend=backend)
        (grad,) = torch.autograd.grad(y, tensor, inputs.dy)
        assert torch.equal(grad, everything[f"d{name}"]), name


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(case: Case, dtype: torch.dtype, backend: str) -> None:
    check(case, make_inputs(case, dtype), backend)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_float32_parameters_beside_low_precision_activations(
    operator: str, dtype: torch.dtype, backend: str
) -> None:
    case = Case(operator, (2, 6, 9, 50))
    check(case, make_inputs(case, dtype, parameter_dtype=torch.float32), backend)


@pytest.mark.parametrize("backend", BACKENDS[-1:], indirect=True)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_drawn_shapes(data: st.DataObject, backend: str) -> None:
    operator = data.draw(st.sampled_from(OPERATORS))
    shape = data.draw(
        st.tuples(st.integers(1, 3), st.integers(1, 16), st.integers(1, 16), st.integers(1, 70))
    )
    case = Case(
        operator,
        shape,
        kernel_size=data.draw(st.sampled_from([3, 5, 7, 9, 11, 13])),
        options=data.draw(st.sampled_from(OPTIONS[operator])),
        affine=data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
        layout=data.draw(st.sampled_from(["contiguous", "channels_first", "sliced"])),
    )
    check(case, make_inputs(case, data.draw(st.sampled_from(DTYPES))), backend)


def pads_before_the_norm(
    h: Tensor, conv_weight: Tensor, conv_bias: Tensor, ln_weight: Tensor, ln_bias: Tensor
) -> Tensor:
    """nested_conv with the classic mistake: zeros around g, which the norm turns into its bias."""
    p = conv_weight.shape[-1] // 2
    g = F.gelu(h)
    padded = F.pad(g, (0, 0, p, p, p, p))
    z = F.layer_norm(padded, padded.shape[-1:], ln_weight, ln_bias, 1e-6).permute(0, 3, 1, 2)
    conv = F.conv2d(z, conv_weight, conv_bias, groups=h.shape[-1]).permute(0, 2, 3, 1)
    return F.gelu(g + conv)


def test_padding_before_the_norm_is_caught() -> None:
    (case,) = [c for c in CASES if c.operator == "nested_conv" and c.ln_bias]
    inputs = make_inputs(case, torch.float32)
    truth = case.formula(*inputs.to(torch.float64).args)
    eager = case.formula(*inputs.args)
    assert_accurate("y", eager, eager, truth)
    with pytest.raises(AssertionError, match="y is off by"):
        assert_accurate("y", pads_before_the_norm(*inputs.args), eager, truth)  # type: ignore[arg-type]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("backend", [f"cpu-{isa}" for isa in CPU_ISAS], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_same_bits_for_every_run_and_thread_count(
    operator: str, dtype: torch.dtype, backend: str
) -> None:
    case = Case(operator, (3, 23, 17, 50))
    inputs = make_inputs(case, dtype)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(output_and_gradients(case.function, inputs, backend=backend))
    for other in results[1:]:
        for name, tensor in other.items():
            assert torch.equal(tensor, results[0][name]), name


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("backend", [f"cpu-{isa}" for isa in CPU_ISAS], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 45, 5, 20), (2, 7, 7, 33)], ids=str)
@pytest.mark.parametrize("operator", CONV_OPERATORS)
def test_nothing_is_left_of_an_earlier_call(
    operator: str, shape: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    """Scratch memory is kept from call to call; bands begin at even rows and at odd ones."""
    case = Case(operator, shape)
    inputs, bad = make_inputs(case, dtype), make_inputs(case, dtype)
    with torch.no_grad():
        bad.args[0].fill_(float("nan"))  # type: ignore[union-attr]
    expected = output_and_gradients(case.function, inputs, backend=backend)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        output_and_gradients(case.function, bad, backend=backend)
        found = output_and_gradients(case.function, inputs, backend=backend)
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), name


@each_backend
@pytest.mark.parametrize("operator", OPERATORS)
def test_only_the_gradients_asked_for(operator: str, backend: str) -> None:
    case = Case(operator, (2, 5, 6, 12))
    check_each_gradient_alone(case, make_inputs(case, torch.float32), backend)


@each_backend
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", [(0, 5, 6, 12), (2, 0, 6, 12), (2, 5, 0, 12)])
def test_empty_batch(operator: str, shape: tuple[int, ...], backend: str) -> None:
    case = Case(operator, shape)
    results = output_and_gradients(case.function, make_inputs(case, torch.float32), backend=backend)
    assert results.pop("y").shape == shape
    for name, grad in results.items():
        assert (grad == 0).all(), name


@each_backend
@pytest.mark.parametrize("operator", CONV_OPERATORS)
def test_gradients_have_the_strides_of_their_inputs(operator: str, backend: str) -> None:
    case = Case(operator, (2, 6, 5, 24), layout="channels_first")
    inputs = make_inputs(case, torch.float32)
    weight = inputs.tensors["conv_weight"]
    assert weight is not None
    strided = weight.detach().to(memory_format=torch.channels_last).requires_grad_()
    inputs.tensors["conv_weight"] = strided
    assert strided.stride() != weight.stride()
    results = output_and_gradients(case.function, inputs, backend=backend)
    for name, tensor in inputs.tensors.items():
        assert tensor is not None
        assert results[f"d{name}"].stride() == tensor.stride(), name


@each_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_reach(value: float, backend: str) -> None:
    """A bad pixel poisons its own row statistics and the outputs its kernel reaches, no others.

    In float32: in pairs of rows of bfloat16 it reaches another row (csrc/depthwise_row.h).
    """
    case = Case("nested_conv", (1, 13, 13, 8), kernel_size=3)
    inputs = make_inputs(case, torch.float32, requires_grad=False)
    h = inputs.tensors["h"]
    assert h is not None
    clean = case.function(*inputs.args, backend=backend)
    h[0, 6, 6, 0] = value
    y = case.function(*inputs.args, backend=backend)
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[:, 5:8, 5:8] = True
    assert not y[reached].isfinite().any()
    assert torch.equal(y[~reached], clean[~reached])
