"""`accelerate` where no other library is needed."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from convnest_kernels import BackendError, NestedBlock, accelerate, backends
from convnest_kernels.adopt import AccelerateError, matmul
from convnest_kernels.adopt.gelu_linear import gelu_linear
from tests.small_models import small
from tests.tolerances import assert_accurate


def test_nested_blocks_get_the_backend_and_give_it_back() -> None:
    model = small(backend="eager")
    blocks = [module for module in model.modules() if isinstance(module, NestedBlock)]
    report = accelerate(model, strict=True)
    assert len(report.replaced) == len(blocks) and {b.backend for b in blocks} == {None}
    again = accelerate(model)
    assert not again.replaced and len(again.already) == len(blocks)
    report.undo()
    assert {block.backend for block in blocks} == {"eager"}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_numbers_of_nested_blocks(channels_last: bool, autocast: bool) -> None:
    """Forward and all gradients, against the eager formulas that the model was built with."""
    x = torch.randn(2, 3, 64, 64)

    def run(model: nn.Module, dtype: torch.dtype, autocast: bool = False) -> dict[str, Tensor]:
        if channels_last:
            model.to(memory_format=torch.channels_last)
        images = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(images)
        weights = torch.linspace(-1, 1, y.numel()).to(y.dtype).reshape(y.shape)
        named = dict(model.named_parameters())
        grads = torch.autograd.grad((y * weights).sum(), [images, *named.values()])
        return {"y": y.detach(), "x": grads[0], **dict(zip(named, grads[1:], strict=True))}

    theirs = small(backend="eager")
    truth = run(copy.deepcopy(theirs).double(), torch.float64)
    ours = copy.deepcopy(theirs)
    parameters = [id(parameter) for parameter in ours.parameters()]
    report = accelerate(ours, strict=True)
    assert {layer.backend for layer in report.replaced} == {"cpu"}
    assert [id(parameter) for parameter in ours.parameters()] == parameters
    assert list(ours.state_dict()) == list(theirs.state_dict())
    eager, got = run(theirs, torch.float32, autocast), run(ours, torch.float32, autocast)
    # bfloat16 through a network: off by chance, more or less than eager, and the more so the fewer
    # elements there are. So of all tensors' errors of eager half are smaller than `usual`.
    errors = {name: relative_error(eager[name], truth[name]) for name in truth}
    usual = statistics.median(errors.values())
    for name, value in got.items():
        if not autocast:
            assert_accurate(name, value, eager[name], truth[name], rows=x[:, 0].numel())
            continue
        allowed = 4 * max(errors[name], usual) + torch.finfo(torch.bfloat16).eps
        assert value.dtype == eager[name].dtype, name
        assert relative_error(value, truth[name]) <= allowed, name


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


def test_a_backend_that_cannot_run_is_an_error() -> None:
    model = small()
    with pytest.raises(BackendError, match="cannot be accelerated"):
        accelerate(model, backend="cuda")


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        accelerate(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend must be one of"):
        accelerate(nn.Identity(), backend="fast")


def test_strict_wants_a_block() -> None:
    assert str(accelerate(nn.Linear(2, 2))).startswith("0 replaced, 0 already, 0 skipped")
    with pytest.raises(AccelerateError, match="no ConvNeXt block"):
        accelerate(nn.Linear(2, 2), strict=True)


def gelu_then_linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(nn.functional.gelu(h), weight, bias)


PLAIN = {gelu_linear: gelu_then_linear, matmul.differentiable_linear: nn.functional.linear}


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(matmul, "_mkl_is_slow", lambda: request.param)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("function", list(PLAIN))
def test_linear_layers(function: Callable[..., Tensor], dtype: torch.dtype, bias: bool) -> None:
    tensors = {"h": torch.randn(3, 5, 12), "weight": torch.randn(7, 12), "bias": torch.randn(7)}
    if not bias:
        del tensors["bias"]
    dy = torch.randn(3, 5, 7).to(dtype)

    def run(function, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {k: t.to(dtypes[0]).to(dtype).requires_grad_() for k, t in tensors.items()}
        y = function(*(leaves.get(k) for k in ("h", "weight", "bias")))
        grads = torch.autograd.grad(y, list(leaves.values()), dy.to(dtype))
        return {"y": y, **dict(zip(leaves, grads, strict=True))}

    dtypes = (dtype,)

    plain = PLAIN[function]
    truth, eager, ours = run(plain, torch.float64), run(plain, dtype), run(function, dtype)
    for name, value in ours.items():
        assert_accurate(name, value, eager[name], truth[name], rows=15)


def test_gelu_linear_twice_and_in_transforms() -> None:
    h, weight, bias = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3), (4, 3), (4,))
    )
    assert torch.autograd.gradcheck(gelu_linear, (h, weight, bias))
    assert torch.autograd.gradgradcheck(gelu_linear, (h, weight, bias))
    per_sample = torch.func.vmap(torch.func.grad(lambda h: gelu_linear(h, weight, bias).sum()))(h)
    torch.testing.assert_close(
        per_sample, torch.autograd.grad(gelu_linear(h, weight, bias).sum(), h)[0]
    )


def test_auto_leaves_what_only_eager_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    from tests.zoo.models import make

    monkeypatch.setattr(
        backends, "reasons_against", lambda name, call: [] if name == "eager" else ["not built"]
    )
    backends.select.cache_clear()
    report = accelerate(make("timm"))
    assert not report.replaced and "not built" in str(report)
    assert accelerate(make("timm"), backend="eager", strict=True).replaced
