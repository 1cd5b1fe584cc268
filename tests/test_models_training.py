"""The models in training: recomputation, parameter groups, autocast, compilers and copies."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re

import pytest
import torch
from torch import nn

from convnest_kernels import NestedBlock
from convnest_kernels.models import create_model, parameter_groups
from tests.blocks import one_thread  # noqa: F401 (a fixture of every test here)
from tests.small_models import gradients, sizes, small


def test_gradient_checkpointing_changes_no_number() -> None:
    model = small(drop_path_rate=0.3, norm=("batch", "layer")).double()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    results = []
    for mode in ("none", "conv", "all"):
        model.load_state_dict(buffers, strict=False)
        model.set_grad_checkpointing(mode == "all")
        if mode == "conv":
            for module in model.modules():
                if isinstance(module, NestedBlock):
                    module.recompute = "conv"
        torch.manual_seed(0)
        results.append({**gradients(model, x), **copy.deepcopy(dict(model.named_buffers()))})
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, msg=name)

    model = small(recompute="conv")
    model.set_grad_checkpointing()
    modes = {m.recompute for m in model.modules() if isinstance(m, NestedBlock)}
    assert modes == {"all"}
    model.set_grad_checkpointing(False)
    modes = {m.recompute for m in model.modules() if isinstance(m, NestedBlock)}
    assert modes == {"conv"}


def test_group_matcher_and_parameter_groups() -> None:
    model = small()
    groups = parameter_groups(model, weight_decay=0.1, layer_decay=0.5, lr=1.0)
    # stem, five blocks (downsampling layers with the block after them), head
    of_parameter = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(of_parameter)
    assert set(of_parameter) == {id(p) for p in model.parameters()}
    distance = {
        "stem": 6,
        "stages.0.blocks.0": 5,
        "stages.1.downsample": 4,
        "stages.1.blocks.0": 4,
        "stages.2.downsample": 3,
        "stages.2.blocks.0": 3,
        "stages.2.blocks.1": 2,
        "stages.3.downsample": 1,
        "stages.3.blocks.0": 1,
        "head": 0,
    }
    for name, parameter in model.named_parameters():
        group = of_parameter[id(parameter)]
        (layers,) = [layers for start, layers in distance.items() if name.startswith(start)]
        assert group["lr_scale"] == group["lr"] == 0.5**layers, name
        assert group["weight_decay"] == (0.1 if parameter.dim() > 1 else 0), name
    assert len({group["name"] for group in groups}) == len(groups) == 14
    optimizer = torch.optim.AdamW(groups)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [
        0.5**i for i in range(6, -1, -1)
    ]

    coarse = parameter_groups(model, layer_decay=0.5, coarse=True)
    assert sorted({group["lr_scale"] for group in coarse}) == [0.5**i for i in range(5, -1, -1)]
    assert not any("lr" in group for group in coarse)

    plain = parameter_groups(model, weight_decay=0.1)
    assert [group["name"] for group in plain] == ["decay", "no_decay"]
    model.stem.requires_grad_(False)
    frozen = {id(p) for p in model.stem.parameters()}
    kept = {id(p) for group in parameter_groups(model) for p in group["params"]}
    assert not frozen & kept


@pytest.mark.parametrize("iso", [False, True], ids=["hierarchical", "isotropic"])
def test_group_matcher_covers_all_but_the_head(iso: bool) -> None:
    model = small("convnest_iso_atto" if iso else "convnest_atto")
    for coarse in (False, True):
        matcher = model.group_matcher(coarse=coarse)
        blocks = matcher["blocks"]
        patterns = [blocks] if isinstance(blocks, str) else [pattern for pattern, _ in blocks]
        for name, _ in model.named_parameters():
            matched = any(re.match(pattern, name) for pattern in (matcher["stem"], *patterns))
            assert matched != name.startswith("head."), name


@pytest.mark.parametrize("name", ["convnest_atto", "convnest_iso_atto"])
def test_learns(name: str) -> None:
    model = create_model(name, num_classes=4, in_chans=1, drop_path_rate=0.1, **sizes(name))
    x, target = torch.randn(8, 1, 64, 64), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05, 0.9, 1e-2))
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(4), abs=0.2)
    assert min(losses[-5:]) < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["convnest_atto", "convnest_iso_atto"])
def test_autocast(name: str) -> None:
    model = small(name)
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        nn.functional.cross_entropy(y, torch.tensor([1, 2])).backward()
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() < 0.1 * expected.norm()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
    low = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert (low - expected).norm() < 0.1 * expected.norm()


# Copies and compilers.


@pytest.mark.parametrize("name", ["convnest_atto", "convnest_iso_atto"])
def test_copies_pickles_and_reloads(name: str) -> None:
    model = small(name).eval()
    x = torch.randn(2, 3, 32, 32)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    reloaded = small(name).eval()
    reloaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for twin in (reloaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("name", ["convnest_atto", "convnest_iso_atto"])
def test_compiles_without_graph_breaks(name: str, recompute: str) -> None:
    torch.compiler.reset()
    model = small(name, recompute=recompute)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for size in (64, 96):  # the second is compiled with dynamic shapes
        x = torch.randn(2, 3, size, size)
        compiled(x).square().sum().backward()
        model(x).square().sum().backward()
        for (key, value), other in zip(twin.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(value.grad, other.grad, rtol=1e-3, atol=1e-3, msg=key)


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize("name", ["convnest_atto", "convnest_iso_atto"])
def test_exports(name: str, features_only: bool) -> None:
    model = small(name, features_only=features_only).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    x = torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
    x = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(program.module()(x), model(x))


def test_parameter_groups_errors() -> None:
    for layer_decay in (0, 1.5):
        with pytest.raises(ValueError, match=r"layer_decay must be in \(0, 1\], got"):
            parameter_groups(small(), layer_decay=layer_decay)
    with pytest.raises(ValueError, match="weight_decay must not be negative, got -1"):
        parameter_groups(small(), weight_decay=-1)
