"""`accelerate` on the models of other libraries: the same numbers, names, hooks and objects."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from convnest_kernels import accelerate
from convnest_kernels.adopt import AccelerateError
from convnest_kernels.adopt import fused as fused_module
from tests.tolerances import assert_accurate
from tests.zoo.models import (
    BLOCKS,
    DROP_PATH,
    MAKERS,
    assert_same_numbers,
    calls,
    images,
    make,
)

__all__ = ["calls"]  # a fixture

NAMES = list(MAKERS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_output_and_gradients(
    name: str, channels_last: bool, autocast: bool, calls: list[Tensor]
) -> None:
    theirs = make(name)
    if channels_last:
        theirs.to(memory_format=torch.channels_last)
    ours = copy.deepcopy(theirs)
    report = accelerate(ours, strict=True)
    assert len(report.replaced) == BLOCKS and {layer.backend for layer in report.replaced} == {
        "cpu"
    }
    assert_same_numbers(ours, theirs, images(channels_last), autocast)
    assert len(calls) == BLOCKS


@pytest.mark.parametrize("name", NAMES)
def test_inference(name: str, calls: list[Tensor]) -> None:
    theirs = make(name).eval()
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    x = images()
    with torch.no_grad():
        truth = copy.deepcopy(theirs).double()(x.double())
        assert_accurate("y", ours(x), theirs(x), truth, rows=x[:, 0].numel())
    assert len(calls) == BLOCKS


@pytest.mark.parametrize("name", ["timm", "torchvision", "transformers", "dinov3"])
def test_drop_path_drops_the_same_samples(name: str, calls: list[Tensor]) -> None:
    theirs = make(name, **{DROP_PATH.get(name, "drop_path_rate"): 0.8}).train()
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    x = images()
    torch.manual_seed(3)
    expected = theirs(x)
    torch.manual_seed(4)
    assert not torch.allclose(theirs(x), expected, atol=1e-3)
    torch.manual_seed(3)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
    assert calls


@pytest.mark.parametrize("name", NAMES)
def test_only_the_forward_changes(name: str) -> None:
    model = make(name)
    before = {
        "modules": {key: (id(module), type(module)) for key, module in model.named_modules()},
        "parameters": {key: id(p) for key, p in model.named_parameters()},
        "keys": list(model.state_dict()),
        "repr": repr(model),
    }
    report = accelerate(model)
    assert {key: id(p) for key, p in model.named_parameters()} == before["parameters"]
    assert list(model.state_dict()) == before["keys"] and repr(model) == before["repr"]
    for key, module in model.named_modules():
        identity, kind = before["modules"][key]
        assert id(module) == identity and isinstance(module, kind)
        assert type(module).__name__ == kind.__name__
    report.undo()
    report.undo()
    assert {k: (id(m), type(m)) for k, m in model.named_modules()} == before["modules"]
    assert not any("convnest" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_a_second_call_changes_nothing(name: str) -> None:
    model = make(name)
    first = accelerate(model)
    types = [type(module) for module in model.modules()]
    second = accelerate(model, strict=True)
    assert not second.replaced and len(second.already) == BLOCKS
    assert [type(module) for module in model.modules()] == types
    second.undo()
    assert [type(module) for module in model.modules()] == types
    first.undo()
    assert [type(module) for module in model.modules()] != types


def test_another_backend_is_taken_and_given_back(calls: list[Tensor]) -> None:
    model = make("timm")
    accelerate(model, backend="cpu")
    report = accelerate(model, backend="eager")
    assert {layer.backend for layer in report.replaced} == {"eager"}
    assert {block.convnest.backend for block in model.stages[2].blocks} == {"eager"}
    report.undo()
    assert {block.convnest.backend for block in model.stages[2].blocks} == {"cpu"}


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(name: str, calls: list[Tensor]) -> None:
    model = make(name).eval()
    accelerate(model)
    x = images()
    expected = model(x)
    assert len(calls) == BLOCKS
    copied = copy.deepcopy(model)
    if name in ("timm", "torchvision", "timm-v2", "timm-conv_mlp"):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = [copied, torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))]
    else:  # the wrapper in tests/zoo/models.py is a local class
        loaded = [copied, nn.Sequential(pickle.loads(pickle.dumps(model.backbone)))]
        x = x.clone()
    for other in loaded:
        del calls[:]
        y = other(x)
        assert len(calls) == BLOCKS
        torch.testing.assert_close(getattr(y, "pooler_output", y), expected, rtol=0, atol=0)
        with torch.no_grad():  # the copy has parameters of its own
            for parameter in other.parameters():
                parameter.zero_()
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_hooks_on_a_block_run_on_ours(calls: list[Tensor]) -> None:
    model = make("timm")
    seen = []
    block = model.stages[0].blocks[0]
    block.register_forward_hook(lambda module, args, y: seen.append(y))
    accelerate(model)
    block.register_full_backward_hook(lambda module, dx, dy: seen.append(dy))
    model(images()).sum().backward()
    assert len(seen) == 2 and len(calls) == BLOCKS


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", [True, False])
def test_hooks_inside_of_a_block_see_what_they_always_saw(name: str, before: bool) -> None:
    """Hooks on every layer of the model, containers and dropouts too."""

    def watch(model: nn.Module) -> list[tuple[str, list[int]]]:
        seen: list[tuple[str, list[int]]] = []
        for key, module in model.named_modules():
            module.register_forward_hook(
                lambda module, args, y, key=key: (
                    seen.append((key, list(args[0].shape))) if args else None
                )
            )
        return seen

    theirs, ours = make(name), make(name)
    expected = watch(theirs)
    if before:
        seen = watch(ours)
        accelerate(ours, strict=True)
    else:
        accelerate(ours, strict=True)
        seen = watch(ours)
    theirs(images()), ours(images())
    assert seen == expected


@pytest.mark.parametrize("part", ["conv_dw", "norm"])
def test_a_hook_on_one_layer_takes_that_block_out(part: str, calls: list[Tensor]) -> None:
    model = make("timm")
    accelerate(model)
    handle = getattr(model.stages[0].blocks[0], part).register_forward_hook(
        lambda module, args, y: y * 0
    )
    zeroed = model(images())
    assert len(calls) == BLOCKS - 1
    handle.remove()
    assert not torch.allclose(model(images()), zeroed)
    assert len(calls) == 2 * BLOCKS - 1


def test_global_hooks_see_every_layer(calls: list[Tensor]) -> None:
    theirs, ours = make("torchvision"), make("torchvision")
    accelerate(ours)
    counts = []
    for model in (theirs, ours):
        kinds = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, y, kinds=kinds: kinds.append(type(module).__name__)
        )
        model(images())
        handle.remove()
        counts.append(kinds)
    assert counts[0] == counts[1] and not calls


def test_a_layer_replaced_later_is_used(calls: list[Tensor]) -> None:
    model = make("timm")
    accelerate(model)
    model.stages[0].blocks[0].conv_dw = nn.Conv2d(8, 8, 7, padding=6, groups=8, dilation=2)
    nn.utils.parametrizations.weight_norm(model.stages[1].blocks[0].conv_dw)
    plain = copy.deepcopy(model)
    for block in plain.modules():
        if hasattr(block, "convnest"):
            fused_module.put_back(block)
    torch.testing.assert_close(model(images()), plain(images()), rtol=1e-4, atol=1e-4)
    assert len(calls) == BLOCKS - 2


def test_a_layer_inside_the_pointwise_half_may_be_replaced(calls: list[Tensor]) -> None:
    """As PEFT does it: the linear layers become modules of another class."""

    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    theirs = make("timm")
    for name in ("fc1", "fc2"):
        old = getattr(theirs.stages[0].blocks[0].mlp, name)
        new = Adapter(old.in_features, old.out_features)
        new.load_state_dict(old.state_dict())
        setattr(theirs.stages[0].blocks[0].mlp, name, new)
    ours = copy.deepcopy(theirs)
    accelerate(ours, strict=True)
    assert_same_numbers(ours, theirs, images(), autocast=False)


def test_bytes_held_for_backward_shrink() -> None:
    def held(model: nn.Module) -> int:
        sizes = {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = model(images())
        del y
        return sum(sizes.values())

    theirs, ours = make("timm"), make("timm")
    accelerate(ours)
    assert held(ours) < 0.85 * held(theirs)


def test_what_is_skipped_is_said() -> None:
    timm_convnext = pytest.importorskip("timm.models.convnext", reason="timm is not installed")
    options = {"act_layer": "gelu", "norm_layer": timm_convnext.LayerNorm}

    class Own(timm_convnext.ConvNeXtBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = nn.ModuleDict(
        {
            "own": Own(8, **options),
            "strided": timm_convnext.ConvNeXtBlock(8, stride=2, **options),
            "dilated": timm_convnext.ConvNeXtBlock(8, dilation=2, **options),
            "wider": timm_convnext.ConvNeXtBlock(8, 16, **options),
            "even": timm_convnext.ConvNeXtBlock(8, kernel_size=4, **options),
            "patched": timm_convnext.ConvNeXtBlock(8, **options),
            "rms": timm_convnext.ConvNeXtBlock(8, norm_layer=timm_convnext.RmsNorm),
            "good": timm_convnext.ConvNeXtBlock(8, **options),
            "loose": nn.Conv2d(8, 8, 7, groups=8),
            "norm": nn.LayerNorm(8),
        }
    )
    model["patched"].forward = lambda x: x
    report = accelerate(model)
    assert [layer.name for layer in report.replaced] == ["good"]
    reasons = {each.name: each.reason for each in report.skipped}
    assert "forward of its own" in reasons["own"]
    assert "stride (2, 2)" in reasons["strided"]
    assert "Conv2dSame" in reasons["dilated"] or "dilation (2, 2)" in reasons["dilated"]
    assert "not depthwise" in reasons["wider"]
    assert "kernel" in reasons["even"] or "Conv2d" in reasons["even"]
    assert "on the object" in reasons["patched"]
    assert "RmsNorm" in reasons["rms"]
    assert "in no block that is known" in reasons["loose"]
    assert "no operator covers" in reasons["norm"]
    assert all(name in str(report) for name in reasons)
    report.undo()
    with pytest.raises(AccelerateError, match="own: .*forward of its own"):
        accelerate(model, strict=True)
    assert "convnest" not in model["good"].__dict__


def test_a_forward_of_another_version_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("transformers")
    block = type(model.backbone.encoder.stages[0].layers[0])

    def forward(self: nn.Module, features: Tensor) -> Tensor:
        return self.something_new(features)

    monkeypatch.setattr(block, "forward", forward)
    report = accelerate(model)
    assert not report.replaced
    assert "something_new" in next(s.reason for s in report.skipped if not s.expected)
