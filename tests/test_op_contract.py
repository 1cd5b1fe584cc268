"""What PyTorch asks of an operator: compile, export, autocast, transforms, double backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from bench.cases import CONV_OPERATORS, OPERATORS, OPTIONS, Case, Inputs, make_inputs
from convnest_kernels import BackendError, use_backend
from tests import triton_interpreter
from tests.conftest import BACKENDS

# One instruction set stands for the CPU backend here: nothing below depends on which. Triton runs
# in its interpreter, and has no float64.
FLOAT64_BACKENDS = list(dict.fromkeys(["eager", BACKENDS[-1]]))
each_float64_backend = pytest.mark.parametrize("backend", FLOAT64_BACKENDS, indirect=True)
each_backend = pytest.mark.parametrize(
    "backend",
    [*FLOAT64_BACKENDS, *(["triton"] if triton_interpreter.available else [])],
    indirect=True,
)
each_operator = pytest.mark.parametrize("operator", OPERATORS)
each_variant = pytest.mark.parametrize(
    ("operator", "options"),
    [(operator, options) for operator in OPERATORS for options in OPTIONS[operator]],
    ids=str,
)


def small(operator: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Case, Inputs]:
    case = Case(operator, (2, 3, 4, 6), kernel_size=3, **options)
    return case, make_inputs(case, dtype)


def gradients(function: Callable[..., Tensor], inputs: Inputs, **options: Any) -> list[Tensor]:
    y = function(*inputs.args, **options)
    return [y, *torch.autograd.grad(y, inputs.wanted, inputs.dy.to(y.dtype))]


def assert_all_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


def registered(operator: str, direction: str) -> Any:
    return getattr(torch.ops.convnest, f"{operator}_{direction}").default


@each_float64_backend
@each_variant
def test_gradcheck_and_gradgradcheck(operator: str, options: Any, backend: str) -> None:
    case, inputs = small(operator, torch.float64, options=options)

    def function(*args: Tensor) -> Tensor:
        return case.function(*args, **case.kwargs, backend=backend)

    assert torch.autograd.gradcheck(function, inputs.args)
    assert torch.autograd.gradgradcheck(function, inputs.args)


@each_float64_backend
@each_operator
def test_inputs_that_depend_on_each_other(operator: str, backend: str) -> None:
    """Each gradient is the partial one, in a second derivative too."""
    case, inputs = small(operator, torch.float64)
    x, *others = inputs.wanted

    def dependent(x: Tensor, *others: Tensor) -> Tensor:
        # As in a block: t comes from x; and the parameters from one another.
        rest = [p + 0.1 * others[0].mean() + (x.sin() if p.shape == x.shape else 0) for p in others]
        return case.function(x, *rest, backend=backend)

    assert torch.autograd.gradcheck(dependent, (x, *others))
    assert torch.autograd.gradgradcheck(dependent, (x, *others))


@each_backend
@each_operator
@pytest.mark.parametrize("affine", [True, False])
def test_opcheck(operator: str, affine: bool, backend: str) -> None:
    case, inputs = small(operator, affine=affine, bias=affine)
    args = [None if x is None else x.detach() for x in inputs.args]
    variant = {
        "nested_conv": (1e-6, True),
        "dwconv_gelu_layernorm": (1e-6, "gelu", False),
        "gelu_layernorm": (1e-6, False),
        "layernorm_residual": (1e-6,),
    }[operator]
    forward, backward = registered(operator, "forward"), registered(operator, "backward")
    for keep in (True, False):
        torch.library.opcheck(forward, (*args, *variant, keep, backend))
    _, *kept = forward(*args, *variant, True, backend)
    activations = 2 if operator == "layernorm_residual" else 1
    for needs in ([x is not None for x in args], [i == 0 for i in range(len(args))]):
        torch.library.opcheck(
            backward,
            (
                inputs.dy,
                *args[:activations],
                *kept,
                *args[activations:],
                *variant,
                needs,
                backend,
            ),
        )


@each_backend
@each_operator
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_forward_and_backward(operator: str, dynamic: bool, backend: str) -> None:
    torch.compiler.reset()
    case, inputs = small(operator)
    function = torch.compile(case.function, fullgraph=True, dynamic=dynamic)
    expected = gradients(case.function, inputs, backend=backend)
    assert_all_close(gradients(function, inputs, backend=backend), expected)
    other = make_inputs(Case(operator, (1, 5, 3, 6), kernel_size=3), torch.float32)
    expected = gradients(case.function, other, backend=backend)
    assert_all_close(gradients(function, other, backend=backend), expected)


@each_operator
def test_dynamic_compile_does_not_recompile_for_a_new_size(operator: str) -> None:
    torch.compiler.reset()
    case = Case(operator, (2, 4, 5, 6), kernel_size=3)
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(case.function, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for shape in [(2, 4, 5, 6), (3, 7, 9, 6), (4, 8, 3, 6)]:
        inputs = make_inputs(Case(operator, shape, kernel_size=3), torch.float32)
        gradients(function, inputs)
        compilations.append(counter.frame_count)
    assert compilations[0] > 0
    assert len(set(compilations)) == 1


def test_compile_follows_use_backend() -> None:
    torch.compiler.reset()
    case, inputs = small("gelu_layernorm")
    function = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    gradients(function, inputs)
    with use_backend("cuda"), pytest.raises(BackendError, match="backend='cuda' cannot run"):
        gradients(function, inputs)
    gradients(function, inputs)


@each_backend
@each_operator
def test_export(operator: str, backend: str) -> None:
    case, inputs = small(operator)

    class Module(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return case.function(*args, backend=backend)

    args = tuple(x.detach() for x in inputs.wanted)
    exported = torch.export.export(Module(), args)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert f"convnest.{operator}_forward.default" in targets
    torch.testing.assert_close(exported.module()(*args), case.function(*args))


@each_backend
@each_operator
def test_autocast_casts_activations_and_keeps_float32_parameters(
    operator: str, backend: str
) -> None:
    case, inputs = small(operator)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(case.function, inputs, backend=backend)
    low = {
        name: x.detach().to(torch.bfloat16) if x.shape == case.shape else x.detach()
        for name, x in inputs.tensors.items()
        if x is not None
    }
    for x in low.values():
        x.requires_grad_()
    expected = gradients(case.function, Inputs(dict(low), inputs.dy), backend=backend)
    assert ours[0].dtype == torch.bfloat16
    for name, mine, theirs in zip(low, ours[1:], expected[1:], strict=True):
        assert mine.dtype == torch.float32, name
        torch.testing.assert_close(mine, theirs.float())


@each_operator
def test_autocast_leaves_float64_alone(operator: str) -> None:
    case, inputs = small(operator, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert case.function(*inputs.args).dtype == torch.float64


@each_operator
def test_func_transforms(operator: str) -> None:
    case, inputs = small(operator, torch.float64)
    args = tuple(x.detach() for x in inputs.wanted)

    def loss(*args: Tensor) -> Tensor:
        return case.function(*args).square().sum()

    def reference_loss(*args: Tensor) -> Tensor:
        return case.formula(*args).square().sum()

    every = tuple(range(len(args)))
    assert_all_close(
        list(torch.func.grad(loss, every)(*args)),
        list(torch.func.grad(reference_loss, every)(*args)),
    )
    tangents = tuple(torch.randn_like(x) for x in args)
    assert_all_close(
        list(torch.func.jvp(case.function, args, tangents)),
        list(torch.func.jvp(case.formula, args, tangents)),
    )
    batched = args[0].expand(3, *args[0].shape) + torch.randn(3, 1, 1, 1, 1, dtype=torch.float64)
    in_dims = (0, *[None] * (len(args) - 1))
    torch.testing.assert_close(
        torch.func.vmap(case.function, in_dims)(batched, *args[1:]),
        torch.stack([case.formula(x, *args[1:]) for x in batched]),
    )


@each_operator
def test_forward_mode_differentiation(operator: str) -> None:
    case, inputs = small(operator, torch.float64)
    args = [x.detach() for x in inputs.wanted]
    tangent = torch.randn_like(args[0])
    with forward_ad.dual_level():
        dual = case.function(forward_ad.make_dual(args[0], tangent), *args[1:])
        ours = forward_ad.unpack_dual(dual).tangent
    _, theirs = torch.func.jvp(lambda x: case.formula(x, *args[1:]), (args[0],), (tangent,))
    torch.testing.assert_close(ours, theirs)


@each_operator
def test_compiled_func_transforms(operator: str) -> None:
    torch.compiler.reset()
    case, inputs = small(operator, torch.float64)
    args = [x.detach() for x in inputs.wanted]

    def loss(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: function(x, *args[1:]).square().sum()

    compiled = torch.compile(torch.func.grad(loss(case.function)), fullgraph=True)
    torch.testing.assert_close(compiled(args[0]), torch.func.grad(loss(case.formula))(args[0]))

    def directional(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        first = torch.func.grad(loss(function))
        return torch.func.grad(lambda x: first(x).sin().sum())

    compiled = torch.compile(directional(case.function), fullgraph=True)
    torch.testing.assert_close(compiled(args[0]), directional(case.formula)(args[0]))


def test_a_named_backend_refuses_func_transforms() -> None:
    case, inputs = small("gelu_layernorm")
    with pytest.raises(BackendError, match=r"under a torch\.func transform"):
        torch.func.grad(lambda x: case.function(x, None, None, backend="cpu").sum())(
            inputs.wanted[0].detach()
        )


@each_operator
def test_compiled_double_backward_refuses(operator: str) -> None:
    torch.compiler.reset()
    case, inputs = small(operator)
    y = torch.compile(case.function, fullgraph=True)(*inputs.args)
    with pytest.raises(RuntimeError, match="create_graph=False|double backward"):
        first = torch.autograd.grad(y.square().sum(), inputs.wanted, create_graph=True)
        torch.autograd.grad(first[0].sum(), inputs.wanted)


@each_backend
@each_operator
def test_activation_checkpointing(operator: str, backend: str) -> None:
    case, inputs = small(operator)

    def function(*args: Tensor, **options: Any) -> Tensor:
        result = checkpoint(case.function, *args, use_reentrant=False, **options)
        assert isinstance(result, Tensor)
        return result

    for ours, theirs in zip(
        gradients(function, inputs, backend=backend),
        gradients(case.function, inputs, backend=backend),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@each_backend
@each_operator
def test_output_is_contiguous_for_any_strides(operator: str, backend: str) -> None:
    for layout in ("contiguous", "channels_first", "sliced"):
        case = Case(operator, (2, 4, 5, 6), kernel_size=3, layout=layout)
        assert case.function(
            *make_inputs(case, torch.float32).args, backend=backend
        ).is_contiguous()


@each_operator
def test_inference_keeps_nothing_for_backward(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, inputs = small(operator)
    with torch.no_grad():
        y = case.function(*inputs.args)
    assert y.grad_fn is None
    with torch.inference_mode():
        torch.testing.assert_close(case.function(*inputs.args), y)


@each_backend
@pytest.mark.parametrize("operator", CONV_OPERATORS)
def test_bytes_held_for_backward(operator: str, backend: str) -> None:
    """Two wide tensors, the input and u (or c), the row statistics, and the parameters."""
    case = Case(operator, (2, 8, 8, 48))
    inputs = make_inputs(case, torch.float32)
    held: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.function(*inputs.args, backend=backend)
    wide, statistics = 4 * inputs.dy.numel(), 4 * inputs.dy[..., 0].numel()
    parameters = [4 * p.numel() for p in inputs.wanted[1:]]
    assert sorted(held) == sorted([wide, wide, statistics, statistics, *parameters])


@each_operator
def test_flops_are_counted(operator: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    case, inputs = small(operator)
    with FlopCounterMode(display=False) as counter:
        y = case.function(*inputs.args)
        forward = counter.get_total_flops()
        y.backward(inputs.dy)
    taps = 2 * 9 * y.numel() if operator in CONV_OPERATORS else 0
    assert forward == taps
    assert counter.get_total_flops() == 3 * taps
