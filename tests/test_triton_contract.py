"""What the operators promise beyond numbers, on Triton in its interpreter.

test_op_contract.py runs opcheck, compile, export, autocast, checkpointing and strides on this
backend, too; here is what it asks in float64, or of other backends.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from bench.cases import CONV_OPERATORS, OPERATORS, Case, make_inputs
from convnest_kernels import BackendError, ops, use_backend
from tests import triton_interpreter
from tests.test_operators import check, output_and_gradients

pytestmark = pytest.mark.skipif(not triton_interpreter.enable(), reason="needs Triton, and no GPU")

each_operator = pytest.mark.parametrize("operator", OPERATORS)


def small(operator: str, **options: Any) -> Case:
    return Case(operator, (1, 2, 4, 6), kernel_size=3, **options)


@each_operator
def test_double_backward(operator: str) -> None:
    """Through the eager formula: the second derivatives are those of the formula itself."""
    case = small(operator)
    inputs = make_inputs(case, torch.float32)
    seconds = []
    for function, options in ((case.function, {"backend": "triton"}), (case.formula, {})):
        y = function(*inputs.args, **options)
        first = torch.autograd.grad(y, inputs.wanted, inputs.dy, create_graph=True)
        total = sum((grad.sin().sum() for grad in first), torch.zeros(()))
        seconds.append(torch.autograd.grad(total, inputs.wanted, allow_unused=True))
    assert any(grad is not None and grad.abs().max() > 0 for grad in seconds[0])
    for ours, theirs in zip(*seconds, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@each_operator
def test_aot_eager_does_not_recompile_for_a_new_size(operator: str) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    case = small(operator)
    function = torch.compile(case.function, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for shape in ((2, 4, 5, 6), (4, 5, 2, 6)):
        inputs = make_inputs(Case(operator, shape, kernel_size=3), torch.float32)
        y = function(*inputs.args, backend="triton")
        torch.testing.assert_close(y, case.formula(*inputs.args), rtol=1e-4, atol=1e-5)
        y.backward(inputs.dy)
        frames.append(counter.frame_count)
    assert frames[0] > 0 and frames[0] == frames[1]


@each_operator
@pytest.mark.parametrize("shape", [(0, 5, 6, 12), (2, 0, 6, 12), (2, 5, 0, 12)])
def test_empty_batch(operator: str, shape: tuple[int, ...]) -> None:
    case = Case(operator, shape)
    results = output_and_gradients(
        case.function, make_inputs(case, torch.float32), backend="triton"
    )
    assert results.pop("y").shape == shape
    for name, grad in results.items():
        assert (grad == 0).all(), name


@pytest.mark.parametrize("operator", CONV_OPERATORS)
def test_gradients_have_the_strides_of_their_inputs(operator: str) -> None:
    case = small(operator, layout="channels_first")
    inputs = make_inputs(case, torch.float32)
    weight = inputs.tensors["conv_weight"]
    assert weight is not None
    strided = weight.detach().to(memory_format=torch.channels_last).requires_grad_()
    inputs.tensors["conv_weight"] = strided
    assert strided.stride() != weight.stride()
    check(case, inputs, "triton")
    results = output_and_gradients(case.function, inputs, backend="triton")
    for name, tensor in inputs.tensors.items():
        assert tensor is not None
        assert results[f"d{name}"].stride() == tensor.stride(), name


def test_refuses_func_transforms_by_name() -> None:
    (x, *_) = make_inputs(small("gelu_layernorm"), torch.float32).wanted
    with pytest.raises(BackendError, match=r"under a torch\.func transform"):
        torch.func.grad(lambda x: ops.gelu_layernorm(x, None, None, backend="triton").sum())(
            x.detach()
        )


@pytest.mark.parametrize("recompute", ["none", "conv", "all"])
def test_nested_block(recompute: str) -> None:
    """The whole block on this backend, and what it computes again, is bit-equal."""
    c, d = 3, 12
    shapes = [(1, 2, 3, c), (d, c), (d,), (d,), (d,), (d, 1, 3, 3), (d,), (c, d)] + 4 * [(c,)]
    args = tuple(torch.randn(shape) / 2 for shape in shapes)
    wanted = [x.requires_grad_() for x in args]
    results: list[list[Tensor]] = []
    for options in ({"backend": "eager"}, {"backend": "triton", "recompute": recompute}):
        y = ops.nested_block(*args, **options)  # type: ignore[arg-type]
        results.append([y, *torch.autograd.grad(y.sin().sum(), wanted)])
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_use_backend_reaches_the_backward_pass() -> None:
    inputs = make_inputs(small("layernorm_residual"), torch.float32)
    with triton_interpreter.traced() as traces:
        with use_backend("triton"):
            y = ops.layernorm_residual(*inputs.args)  # type: ignore[arg-type]
        y.backward(inputs.dy)
    names = [trace.kernel for trace in traces]
    assert names == ["row_norm_fwd_kernel", "row_norm_bwd_kernel", "sum_partials_kernel"]


@each_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_64_bit_offsets_give_the_same_bits(
    operator: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The switch that tensors of 2^31 elements set, set by hand."""
    from convnest_kernels.triton import _launch

    case = Case(operator, (1, 2, 4, 10), kernel_size=3 if dtype == torch.float32 else 5)
    inputs = make_inputs(case, dtype)
    expected = output_and_gradients(case.function, inputs, backend="triton")
    asked = []
    monkeypatch.setattr(_launch, "needs_int64", lambda x: asked.append(x) is None)
    for name, result in output_and_gradients(case.function, inputs, backend="triton").items():
        assert torch.equal(result, expected[name]), name
    assert len(asked) >= 2
