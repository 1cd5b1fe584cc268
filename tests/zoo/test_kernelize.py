"""Hugging Face's `kernels` loads the layout, and `kernelize` puts its layers into models."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convnest_kernels
from hub import layout
from tests.tolerances import assert_accurate
from tests.zoo.models import BLOCKS, images, make, run

kernels = pytest.importorskip("kernels", reason="Hugging Face's kernels is not installed")

LAYERS = {
    "timm": "ConvNeXtBlock",
    "timm-v2": "ConvNeXtBlock",
    "torchvision": "CNBlock",
    "transformers": "ConvNextLayer",
    "transformers-v2": "ConvNextV2Layer",
    "dinov3": "DINOv3ConvNextLayer",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "convnest-kernels"
    layout.lay_out(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> ModuleType:
    return kernels.get_local_kernel(folder)  # the variant of how torch was built


@pytest.fixture
def calls(loaded: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every input of the loaded kernel's convolution and norm."""
    inputs: list[Tensor] = []
    fused = loaded.adopt.fused
    ours = fused.conv_norm
    monkeypatch.setattr(fused, "conv_norm", lambda *a: (inputs.append(a[0]), ours(*a))[1])
    return inputs


@pytest.fixture
def extensible() -> Iterator[Any]:
    """Make a class of a library extensible, and put it back after the test."""
    changed = []

    def change(cls: type[nn.Module], name: str) -> None:
        kernels.replace_kernel_forward_from_hub(cls, name)
        changed.append(cls)

    yield change
    for cls in changed:
        del cls.kernel_layer_name, cls.kernel_condition


def test_the_build_file_and_metadata_are_valid(folder: Path, loaded: ModuleType) -> None:
    from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

    assert len(Build.open(folder).general.backends) == 3
    for variant in (folder / "build").iterdir():
        metadata = Metadata.read_from_file(variant / "metadata.json")
        assert metadata.name.python_name == "convnest_kernels"
        fresh = Digest.hash_variant(DigestAlgorithm.SHA256, variant).files
        expected = {k: v for k, v in fresh.items() if "__pycache__" not in k}
        assert metadata.digest.files == {
            name: value for name, value in expected.items() if name != "metadata.json"
        }


def test_operators_live_beside_the_installed_ones(loaded: ModuleType) -> None:
    """Two copies in one process, each with registered operators of its own."""
    assert loaded.__name__.startswith("_convnest_kernels_")
    assert loaded.ops is not convnest_kernels.ops
    x, weight, bias = torch.randn(2, 3, 3, 8), torch.randn(8), torch.randn(8)
    expected = convnest_kernels.ops.gelu_layernorm(x, weight, bias)
    torch.testing.assert_close(loaded.ops.gelu_layernorm(x, weight, bias), expected)
    here = getattr(torch.ops, loaded.__name__).gelu_layernorm_forward
    assert here is not torch.ops.convnest.gelu_layernorm_forward


def test_triton_kernels_of_the_layout(loaded: ModuleType) -> None:
    """In Triton's interpreter, through the loaded copy's registered operators."""
    x = torch.randn(2, 5, 6, 24)
    inputs = [x, torch.randn(24, 1, 7, 7), torch.randn(24), torch.randn(24), torch.randn(24)]
    got, eager, truth = (
        _forward_and_gradients(loaded.ops.dwconv_gelu_layernorm, inputs, dtype, backend)
        for dtype, backend in (
            (torch.float32, "triton"),
            (torch.float32, "eager"),
            (torch.float64, "eager"),
        )
    )
    for name, value in got.items():
        assert_accurate(name, value, eager[name], truth[name], rows=60)


def _forward_and_gradients(
    operator: Any, inputs: list[Tensor], dtype: torch.dtype, backend: str
) -> dict[str, Tensor]:
    leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    y = operator(*leaves, backend=backend)
    grads = torch.autograd.grad(y.square().sum(), leaves)
    return {"y": y.detach(), **{str(i): grad for i, grad in enumerate(grads)}}


def blocks(model: nn.Module, name: str) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == LAYERS[name]]


@pytest.mark.parametrize("mode", ["TRAINING", "INFERENCE"])
@pytest.mark.parametrize("name", LAYERS)
def test_kernelize(
    name: str, mode: str, folder: Path, extensible: Any, calls: list[Tensor]
) -> None:
    theirs = make(name).train(mode == "TRAINING")
    layer = LAYERS[name]
    extensible(type(blocks(theirs, name)[0]), layer)
    ours = copy.deepcopy(theirs)
    repository = kernels.LocalLayerRepository(folder, layer_name=layer)
    with kernels.use_kernel_mapping({layer: {"cpu": repository}}, inherit_mapping=False):
        wanted = kernels.Mode[mode] | kernels.Mode.TORCH_COMPILE
        kernels.kernelize(ours, mode=wanted, device="cpu", use_fallback=False)
    assert len(blocks(ours, name)) == BLOCKS
    x = images()
    truth = run(copy.deepcopy(theirs).double(), x.double())
    eager, got = run(theirs, x), run(ours, x)
    assert len(calls) == BLOCKS
    for key, value in got.items():
        assert_accurate(key, value, eager[key], truth[key], rows=x[:, 0].numel())


def test_a_hook_on_a_layer_is_heard(folder: Path, extensible: Any, calls: list[Tensor]) -> None:
    """Where ours would not run a layer that a hook waits on, the library's forward runs."""
    model = make("timm")
    extensible(type(model.stages[0].blocks[0]), "ConvNeXtBlock")
    repository = kernels.LocalLayerRepository(folder, layer_name="ConvNeXtBlock")
    with kernels.use_kernel_mapping({"ConvNeXtBlock": {"cpu": repository}}, inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu", use_fallback=False)
    heard = []
    model.stages[0].blocks[0].norm.register_forward_hook(lambda *args: heard.append(1))
    model(images())
    assert heard == [1] and len(calls) == BLOCKS - 1
