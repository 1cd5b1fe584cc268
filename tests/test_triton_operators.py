"""The Triton kernels through the public operators, in the interpreter, against float64.

Every launch here is also checked for accesses out of bounds and for races between programs
(triton_interpreter.py); what a kernel fails to write is NaN (conftest.py).
"""

from __future__ import annotations

import pytest
import torch

from bench.cases import CASES, CONV_OPERATORS, OPERATORS, Case, make_inputs
from convnest_kernels import explain, ops
from tests import triton_interpreter
from tests.test_operators import check, check_each_gradient_alone, output_and_gradients

pytestmark = pytest.mark.skipif(
    not triton_interpreter.enable(), reason="needs Triton, and no GPU (there they run for real)"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _tile_operations(case: Case, dtype: torch.dtype) -> int:
    """About how many the interpreter runs, at some 65 us each whatever their size."""
    if case.operator not in CONV_OPERATORS:
        return 0
    n, h, w, c = case.shape
    k = case.kernel_size
    matrix = dtype != torch.float32 and k in (5, 7, 9)
    segments = n * -(-w // 8)
    programs = -(-c // 8) * -(-segments // 16) if matrix else -(-c // 64) * -(-segments // 2)
    return programs * (h + k) * (130 if matrix else 12 * k * k)


def _cases() -> list[object]:
    """Each case in each dtype; the longest only where asked for, but one of each form."""
    found = []
    for case in CASES:
        for dtype in DTYPES:
            slow = _tile_operations(case, dtype) > 6_000
            marks = [pytest.mark.slow] if slow else []
            name = f"{case}-{str(dtype).removeprefix('torch.')}"
            found.append(pytest.param(case, dtype, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("case", "dtype"), _cases())
def test_output_and_gradients(case: Case, dtype: torch.dtype) -> None:
    check(case, make_inputs(case, dtype), "triton")


@pytest.mark.parametrize(
    ("kernel_size", "dtype"),
    [
        (9, torch.bfloat16),
        (11, torch.float32),
        (13, torch.float16),
    ],
    ids=str,
)
def test_large_kernels(kernel_size: int, dtype: torch.dtype) -> None:
    """Their weight gradient is split over launches; their other cases are marked slow."""
    case = Case("nested_conv", (1, 2, 3, 10), kernel_size=kernel_size)
    check(case, make_inputs(case, dtype), "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_float32_parameters_beside_low_precision_activations(
    operator: str, dtype: torch.dtype
) -> None:
    case = Case(operator, (2, 3, 9, 50))
    check(case, make_inputs(case, dtype, parameter_dtype=torch.float32), "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_same_bits_for_every_run(operator: str, dtype: torch.dtype) -> None:
    case = Case(operator, (3, 4, 5, 50))
    inputs = make_inputs(case, dtype)
    first, second = (
        output_and_gradients(case.function, inputs, backend="triton") for _ in range(2)
    )
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_only_the_gradients_asked_for(operator: str, dtype: torch.dtype) -> None:
    case = Case(operator, (2, 3, 4, 12), kernel_size=3 if dtype == torch.float32 else 7)
    check_each_gradient_alone(case, make_inputs(case, dtype), "triton")


@pytest.mark.parametrize("operator", OPERATORS)
def test_forward_alone_is_forward_with_gradients(operator: str) -> None:
    case = Case(operator, (2, 4, 5, 20))
    inputs = make_inputs(case, torch.bfloat16)
    kept = case.function(*inputs.args, backend="triton")
    with torch.no_grad():
        alone = case.function(*inputs.args, backend="triton")
    assert torch.equal(kept, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of inf - inf
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_reach(value: float, dtype: torch.dtype) -> None:
    """A bad pixel reaches the outputs of its taps; on tensor cores, of its whole segment's window.

    0 * NaN is NaN in a banded product: the eight outputs of a segment share the sixteen inputs.
    """
    case = Case("nested_conv", (1, 5, 26, 8), kernel_size=5)
    inputs = make_inputs(case, dtype, requires_grad=False)
    h = inputs.tensors["h"]
    assert h is not None
    clean = case.function(*inputs.args, backend="triton")
    h[0, 1, 11, 0] = value
    y = case.function(*inputs.args, backend="triton")
    certain, possible = (torch.zeros_like(y, dtype=torch.bool) for _ in range(2))
    certain[:, :4, 9:14] = True
    possible[:, :4] = certain[:, :4]
    if dtype != torch.float32:
        possible[:, :4, 0:24] = True  # segments of columns 0, 8 and 16 see column 11
    assert not y[certain].isfinite().any()
    assert torch.equal(y[~possible], clean[~possible])


def test_strips_and_chunks_split_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several strips down an image, and several strips and groups a chunk, as large inputs have."""
    from convnest_kernels.triton import heuristics

    monkeypatch.setattr(heuristics, "strip_rows", lambda *args, **kwargs: 3)
    monkeypatch.setattr(heuristics, "conv_chunks", lambda strips, blocks: 2)
    monkeypatch.setattr(heuristics, "row_programs", lambda rows, block_r, channels: 2)
    for dtype in (torch.float32, torch.bfloat16):
        case = Case("nested_conv", (5, 7, 9, 20), kernel_size=3 if dtype == torch.float32 else 7)
        check(case, make_inputs(case, dtype), "triton")


def test_64_bit_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    from convnest_kernels.triton import _launch

    monkeypatch.setattr(_launch, "needs_int64", lambda x: True)
    for operator in OPERATORS:
        case = Case(operator, (2, 3, 5, 20))
        check(case, make_inputs(case, torch.bfloat16), "triton")


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiled_and_checked(operator: str) -> None:
    case = Case(operator, (2, 3, 4, 20))
    inputs = make_inputs(case, torch.bfloat16)

    def run(*args: torch.Tensor) -> torch.Tensor:
        return case.function(*args, backend="triton")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = output_and_gradients(run, inputs)
    found = output_and_gradients(compiled, inputs)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_explain_names_the_reasons() -> None:
    inputs = make_inputs(Case("nested_conv", (1, 3, 3, 8)), torch.float32)
    assert not explain(ops.nested_conv, *inputs.args).reasons["triton"]
    wide = make_inputs(Case("nested_conv", (1, 3, 3, 8), kernel_size=15), torch.float64)
    reasons = explain(ops.nested_conv, *wide.args).reasons["triton"]
    assert [reason.split()[0:3] for reason in reasons] == [
        ["it", "has", "no"],
        ["its", "kernel", "sizes"],
    ]
