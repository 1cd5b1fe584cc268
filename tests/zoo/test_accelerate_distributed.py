"""`accelerate` before and after DDP and FSDP2, in a group of one CPU rank."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from convnest_kernels import accelerate
from convnest_kernels.adopt import fused as fused_module
from tests.zoo.models import BLOCKS, images, make

pytest.importorskip("timm", reason="timm is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the distributed packages


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    inputs: list[Tensor] = []
    ours = fused_module.conv_norm
    monkeypatch.setattr(fused_module, "conv_norm", lambda *a: (inputs.append(a[0]), ours(*a))[1])
    return inputs


def wrap(model: nn.Module, kind: str) -> nn.Module:
    if kind == "DDP":
        return DistributedDataParallel(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for stage in model.stages:
        for block in stage.blocks:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model(images()).square().sum().backward()
    named = {key.removeprefix("module."): p.grad for key, p in model.named_parameters()}
    return {key: getattr(grad, "to_local", lambda grad=grad: grad)() for key, grad in named.items()}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("first", ["accelerate", "wrap"])
@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_gradients_are_those_of_one_process(kind: str, first: str, calls: list[Tensor]) -> None:
    plain = make("timm")
    model = copy.deepcopy(plain)
    expected = gradients(plain)
    if first == "accelerate":
        report = accelerate(model, strict=True)
        model = wrap(model, kind)
    else:
        model = wrap(model, kind)
        report = accelerate(model, strict=True)
    assert len(report.replaced) == BLOCKS
    for key, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-3, atol=1e-3)
    assert len(calls) == BLOCKS
    report.undo()
    model.zero_grad()
    for key, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-3, atol=1e-3)
    assert len(calls) == BLOCKS, "undo left ours in place"
    assert len(accelerate(model, strict=True).replaced) == BLOCKS
