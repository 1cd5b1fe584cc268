"""The CUDA and Triton kernels on a GPU, through the public operators, against float64.

What the emulation and the interpreter cannot show: launches, streams, graphs, the hardware's own
approximations, and grids that fill it. Everywhere else these tests skip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bench.cases import CASES, CONV_OPERATORS, OPERATORS, Case, make_inputs, stage_cases
from convnest_kernels import NestedBlock, accelerate, backends, explain, models
from convnest_kernels.backends import Call
from tests import blocks
from tests.test_operators import check, check_each_gradient_alone, output_and_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BACKENDS = ["cuda", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_operator = pytest.mark.parametrize("operator", OPERATORS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def plain_peers() -> Iterator[None]:
    """Eager by torch's own kernels, without TF32: a bound must not grow with its errors."""
    cudnn, tf32 = torch.backends.cudnn.enabled, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.enabled = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.enabled, torch.backends.cuda.matmul.allow_tf32 = cudnn, tf32


def skip_unless_it_can(backend: str, case: Case, dtype: torch.dtype) -> None:
    kernel_size = case.kernel_size if case.operator in CONV_OPERATORS else None
    call = Call(case.operator, "cuda", dtype, case.shape[-1], kernel_size, case.shape)
    if reasons := backends.reasons_against(backend, call):
        pytest.skip("; ".join(reasons))


@each_backend
@each_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(case: Case, dtype: torch.dtype, backend: str) -> None:
    skip_unless_it_can(backend, case, dtype)
    check(case, make_inputs(case, dtype, device="cuda"), backend)


@each_backend
@each_dtype
@pytest.mark.parametrize("case", [c for o in OPERATORS for c in stage_cases("convnest_tiny", 3, o)],
                         ids=str)  # fmt: skip
def test_stage_shapes(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Grids of many blocks, and the sizes whose kernels the models run."""
    skip_unless_it_can(backend, case, dtype)
    check(case, make_inputs(case, dtype, device="cuda"), backend)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@each_operator
def test_float32_parameters_beside_low_precision_activations(
    operator: str, dtype: torch.dtype, backend: str
) -> None:
    case = Case(operator, (2, 6, 9, 48))
    skip_unless_it_can(backend, case, dtype)
    check(case, make_inputs(case, dtype, torch.float32, device="cuda"), backend)


@each_backend
@each_dtype
@each_operator
def test_same_bits_for_every_run(operator: str, dtype: torch.dtype, backend: str) -> None:
    case = Case(operator, (24, 28, 28, 96))
    skip_unless_it_can(backend, case, dtype)
    inputs = make_inputs(case, dtype, device="cuda")
    first = output_and_gradients(case.function, inputs, backend=backend)
    for _ in range(5):
        again = output_and_gradients(case.function, inputs, backend=backend)
        for name, tensor in first.items():
            assert torch.equal(tensor, again[name]), name


@each_backend
@each_operator
def test_only_the_gradients_asked_for(operator: str, backend: str) -> None:
    case = Case(operator, (2, 5, 6, 16))
    skip_unless_it_can(backend, case, torch.bfloat16)
    check_each_gradient_alone(case, make_inputs(case, torch.bfloat16, device="cuda"), backend)


@each_backend
@each_operator
@pytest.mark.parametrize("shape", [(0, 5, 6, 16), (2, 0, 6, 16)], ids=str)
def test_empty_batch(operator: str, shape: tuple[int, ...], backend: str) -> None:
    case = Case(operator, shape)
    skip_unless_it_can(backend, case, torch.bfloat16)
    inputs = make_inputs(case, torch.bfloat16, device="cuda")
    results = output_and_gradients(case.function, inputs, backend=backend)
    assert results.pop("y").shape == shape
    for name, grad in results.items():
        assert (grad == 0).all(), name


@each_backend
@each_operator
def test_it_runs_on_the_callers_stream(operator: str, backend: str) -> None:
    """Inputs that a busy side stream writes late: a launch elsewhere would read NaN."""
    case = Case(operator, (4, 28, 28, 96))
    skip_unless_it_can(backend, case, torch.bfloat16)
    inputs = make_inputs(case, torch.bfloat16, device="cuda", requires_grad=False)
    expected = case.function(*inputs.args, backend=backend)
    late = {name: torch.full_like(x, math.nan) for name, x in inputs.tensors.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        torch.cuda._sleep(20_000_000)
        for name, x in inputs.tensors.items():
            late[name].copy_(x)
        y = case.function(*late.values(), backend=backend)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(y, expected)


@each_backend
@each_operator
def test_a_graph_captures_forward_and_backward(operator: str, backend: str) -> None:
    case = Case(operator, (2, 14, 14, 96))
    skip_unless_it_can(backend, case, torch.bfloat16)
    inputs = make_inputs(case, torch.bfloat16, device="cuda")
    # Detached: a graph of autograd's that lives on would tie the leaves to this stream.
    expected = {
        name: tensor.detach()
        for name, tensor in output_and_gradients(case.function, inputs, backend=backend).items()
    }
    torch.cuda.synchronize()
    # What a capture allocates is filled with NaN in every replay, too.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = output_and_gradients(case.function, inputs, backend=backend)
    for tensor in found.values():
        tensor.detach().fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@each_backend
@each_operator
def test_compiled(operator: str, backend: str) -> None:
    case = Case(operator, (2, 7, 9, 48))
    skip_unless_it_can(backend, case, torch.bfloat16)
    inputs = make_inputs(case, torch.bfloat16, device="cuda")

    def run(*args: Tensor) -> Tensor:
        return case.function(*args, backend=backend)

    expected = output_and_gradients(run, inputs)
    found = output_and_gradients(torch.compile(run, fullgraph=True), inputs)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@each_operator
def test_auto_runs_on_a_gpu_backend(operator: str) -> None:
    case = Case(operator, (2, 7, 9, 48))
    inputs = make_inputs(case, torch.bfloat16, device="cuda")
    explanation = explain(case.function, *inputs.args)
    assert explanation.backend in BACKENDS
    auto = output_and_gradients(case.function, inputs)
    named = output_and_gradients(case.function, inputs, backend=explanation.backend)
    for name, tensor in auto.items():
        assert torch.equal(tensor, named[name]), name


@each_backend
@pytest.mark.parametrize("recompute", ["none", "conv", "all"])
def test_block(recompute: str, backend: str) -> None:
    skip_unless_it_can(backend, Case("nested_conv", (2, 14, 14, 576)), torch.float32)
    block = NestedBlock(48, backend=backend, recompute=recompute).cuda()
    formula = NestedBlock(48, backend="eager").double().cuda()
    with torch.no_grad():
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.2)
    formula.load_state_dict(block.state_dict())
    x, dy = (torch.randn(2, 48, 14, 14, device="cuda") for _ in range(2))
    truth = blocks.run(formula, x.double(), dy.double())
    for name, tensor in blocks.run(block, x, dy).items():
        scale = truth[name].abs().max().item()
        torch.testing.assert_close(tensor.double(), truth[name], rtol=0, atol=2e-5 * scale)


@each_backend
def test_a_network_trains(backend: str) -> None:
    """Ten steps in bfloat16 autocast follow eager's, and the loss falls."""
    skip_unless_it_can(backend, Case("nested_conv", (2, 14, 14, 576)), torch.bfloat16)
    images = torch.randn(8, 3, 64, 64, device="cuda")
    labels = torch.arange(8, device="cuda")
    losses: dict[str, list[float]] = {}
    for name in (backend, "eager"):
        torch.manual_seed(0)
        network = models.create_model("convnest_atto", num_classes=8).cuda()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        losses[name] = []
        for _ in range(10):
            with backends.use_backend(name), torch.autocast("cuda", torch.bfloat16):
                loss = nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    ours, eager = losses[backend], losses["eager"]
    assert ours[-1] < 0.8 * ours[0]
    assert ours == pytest.approx(eager, rel=0.05, abs=0.02)


def test_accelerated_convnext() -> None:
    """timm's ConvNeXt before and after: logits and every gradient, in float32."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", num_classes=8, ls_init_value=0.1).cuda()
    images = torch.randn(4, 3, 64, 64, device="cuda")

    def run() -> list[Tensor]:
        logits = model(images)
        parameters = list(model.parameters())
        return [logits.detach(), *torch.autograd.grad(logits.square().sum(), parameters)]

    before = run()
    report = accelerate(model, strict=True)
    assert {layer.backend for layer in report.replaced} == {"cuda"}
    for mine, theirs in zip(run(), before, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 * scale + 1e-6)
    with torch.autocast("cuda", torch.bfloat16):
        low = model(images)
    assert (low.float() - before[0]).norm() < 0.05 * before[0].norm()


@pytest.mark.slow
@each_backend
@each_operator
def test_more_than_2_to_31_elements(operator: str, backend: str) -> None:
    """Every image alike, so that each one must give what the first gives."""
    case = Case(operator, (5200, 28, 28, 528))
    skip_unless_it_can(backend, case, torch.bfloat16)
    free, _ = torch.cuda.mem_get_info()
    wide = 2 * math.prod(case.shape)
    if free < 12 * wide:
        pytest.skip(f"needs {12 * wide >> 30} GiB of GPU memory, {free >> 30} are free")
    torch.use_deterministic_algorithms(False)  # it would fill each of them with NaN first
    one = make_inputs(Case(operator, (1, *case.shape[1:])), torch.bfloat16, device="cuda")
    expected = output_and_gradients(case.function, one, backend=backend)
    tensors = {
        name: x.detach().expand(case.shape).contiguous().requires_grad_()
        if x is not None and x.dim() == 4 and x.shape[-1] == case.shape[-1]
        else x
        for name, x in one.tensors.items()
    }
    dy = one.dy.expand(case.shape).contiguous()
    y = case.function(*tensors.values(), backend=backend)
    wanted = [x for x in tensors.values() if x is not None]
    grads = dict(zip(tensors, torch.autograd.grad(y, wanted, dy), strict=True))
    for at in (0, 2599, case.shape[0] - 1):
        assert torch.equal(y[at], expected["y"][0])
        for name, x in tensors.items():
            if x is not None and x.shape == case.shape:
                assert torch.equal(grads[name][at], expected[f"d{name}"][0]), name
