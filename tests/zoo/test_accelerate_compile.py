"""`accelerate` before and after torch.compile, and under torch.fx."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from convnest_kernels import accelerate, backends
from convnest_kernels.adopt import fused as fused_module
from tests.zoo.models import BLOCKS, MAKERS, assert_same_numbers, images, make

CASES = [
    *((name, "aot_eager", "accelerate") for name in MAKERS),
    *((name, "aot_eager", "compile") for name in ("timm", "torchvision", "transformers")),
    # A minute each: in the tests that CI runs, the compiler's default gets a block.
    pytest.param("timm", "inductor", "accelerate", marks=pytest.mark.slow),
    pytest.param("timm", "inductor", "compile", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """All models run through one function of tests/zoo/models.py, and that only so often."""
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "compiler", "first"), CASES)
def test_compile(name: str, compiler: str, first: str) -> None:
    """One graph, forward and backward, with ours in it; and after `undo` with theirs again."""
    theirs = make(name)
    ours = copy.deepcopy(theirs)
    x = images()
    if first == "accelerate":
        report = accelerate(ours, strict=True)
        compiled = torch.compile(ours, fullgraph=True, backend=compiler)
    else:
        compiled = torch.compile(ours, fullgraph=True, backend=compiler)
        if compiler == "aot_eager":
            compiled(x)
        report = accelerate(compiled, strict=True)
        assert all(layer.name.startswith("_orig_mod.") for layer in report.replaced)
    assert_same_numbers(compiled, _Wrapper(theirs), x, autocast=False)
    with pytest.MonkeyPatch.context() as patch:  # ours is in the graph: nothing runs without it
        patch.setattr(backends, "implementation", _refuse)
        with pytest.raises(RuntimeError, match="ours was called"):
            compiled(x)
        report.undo()
        if compiler == "aot_eager":
            compiled(x)


@pytest.mark.parametrize("first", ["accelerate", "compile"])
def test_inductor(first: str) -> None:
    """A block through torch.compile as it comes, forward and backward in one graph each."""
    theirs = make("timm").stages[0]
    ours = copy.deepcopy(theirs)
    x = torch.randn(2, 8, 9, 7)
    if first == "accelerate":
        accelerate(ours, strict=True)
    compiled = torch.compile(ours, fullgraph=True)
    if first == "compile":
        accelerate(compiled, strict=True)
    assert_same_numbers(compiled, _Wrapper(theirs), x, autocast=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "implementation", _refuse)
        with pytest.raises(RuntimeError, match="ours was called"):
            compiled(x)


def _refuse(*args: object) -> None:
    raise RuntimeError("ours was called")


class _Wrapper(nn.Module):
    """Names as torch.compile makes them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model

    def forward(self, x: Tensor) -> Tensor:
        return self._orig_mod(x)


def test_torch_fx_traces_ours() -> None:
    feature_extraction = pytest.importorskip(
        "torchvision.models.feature_extraction", reason="torchvision is not installed"
    )
    model = make("torchvision").eval()
    x = images()
    expected = model.features(x)
    accelerate(model)
    extractor = feature_extraction.create_feature_extractor(model, {"features": "maps"})
    calls = [node for node in extractor.graph.nodes if node.target is fused_module.conv_norm]
    assert len(calls) == BLOCKS
    torch.testing.assert_close(extractor(x)["maps"], expected, rtol=1e-4, atol=1e-4)
    report = accelerate(extractor)
    assert not report.replaced and "before tracing" in str(report)
