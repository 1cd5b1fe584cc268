"""The 14 models through timm: our equivalents of its own model tests, and its training tools.

timm's tests/test_models.py, and what stands here for each:

    forward, backward            test_same_numbers_as_ours, test_backward_reaches_every_parameter
    default_cfgs                 test_registered_with_a_default_cfg, test_classifier_is_reset
    forward_features             test_features_only
    forward_intermediates        test_forward_intermediates, test_features_only (pruned)
    forward_fx, backward_fx      test_torch_fx
    forward_torchscript          test_torchscript: traced; scripting is an error
    inference, load_pretrained   test_pretrained_is_an_error: there are no weights
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm", reason="timm is not installed")

import convnest_kernels.timm  # noqa: E402, F401  (registers the models)
from convnest_kernels.models import VARIANTS, create_model  # noqa: E402
from tests.small_models import sizes  # noqa: E402

NAMES = list(VARIANTS)
ONE_OF_EACH = ["convnest_atto", "convnest_iso_atto"]


def small(name: str, **options: object) -> nn.Module:
    return timm.create_model(name, **{"num_classes": 7, **sizes(name), **options})


def images(name: str, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64)


@pytest.mark.parametrize("name", NAMES)
def test_registered_with_a_default_cfg(name: str) -> None:
    assert timm.is_model(name) and name in timm.list_models("convnest*", module="timm")
    assert not timm.models.is_model_pretrained(name)
    with torch.device("meta"):
        theirs, ours = timm.create_model(name), create_model(name)
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert shapes == {key: value.shape for key, value in ours.state_dict().items()}
    cfg = theirs.default_cfg
    assert f"{cfg['classifier']}.weight" in shapes and f"{cfg['first_conv']}.weight" in shapes
    assert theirs.get_classifier().out_features == cfg["num_classes"] == 1000
    side = cfg["input_size"][-1] // theirs.feature_info[-1]["reduction"]
    assert cfg["pool_size"] == (side, side)


def test_pretrained_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="retrained"):
        timm.create_model("convnest_atto", pretrained=True)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_same_numbers_as_ours(name: str) -> None:
    theirs = small(name).eval()
    ours = create_model(name, num_classes=7, **sizes(name)).eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(name)
    torch.testing.assert_close(theirs(x), ours(x))
    torch.testing.assert_close(theirs.forward_features(x), ours.forward_features(x))


@pytest.mark.parametrize("name", NAMES)
def test_backward_reaches_every_parameter(name: str) -> None:
    model = small(name).train()
    y = model(images(name))
    assert y.shape == (2, 7) and y.isfinite().all()
    y.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", NAMES)
def test_classifier_is_reset(name: str) -> None:
    model = small(name).eval()
    x = images(name)
    side = 64 // model.feature_info[-1]["reduction"]
    assert model.forward_features(x).shape == (2, model.num_features, side, side)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (
        2,
        model.head_hidden_size,
    )
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, model.num_features, side, side)
    model.reset_classifier(5, "max")
    assert model(x).shape == (2, 5) and model.get_classifier().weight.std() < 0.03
    model.reset_classifier(3, "avg", reset_other=True)
    assert model(x).shape == (2, 3) and isinstance(model.head.norm, nn.Identity)
    assert small(name, num_classes=0, global_pool="")(x).shape == (
        2,
        model.num_features,
        side,
        side,
    )
    assert small(name, num_classes=0)(x).shape == (2, model.num_features)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_features_only(name: str) -> None:
    x = images(name)
    whole = small(name).eval()
    features = small(name, features_only=True).eval()
    features.model.load_state_dict(whole.state_dict(), strict=False)
    maps = features(x)
    assert features.feature_info.channels() == [y.shape[1] for y in maps]
    assert features.feature_info.reduction() == [64 // y.shape[2] for y in maps]
    assert len(maps) == 4
    torch.testing.assert_close(maps[-1], whole.forward_features(x))
    two = small(name, features_only=True, out_indices=(0, 2)).eval()
    two.model.load_state_dict(whole.state_dict(), strict=False)
    for got, expected in zip(two(x), maps[0:3:2], strict=True):
        torch.testing.assert_close(got, expected)
    assert sum(p.numel() for p in two.parameters()) < sum(p.numel() for p in features.parameters())


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_forward_intermediates(name: str) -> None:
    model = small(name).eval()
    x = images(name)
    last, maps = model.forward_intermediates(x)
    torch.testing.assert_close(last, model.forward_features(x))
    assert len(maps) == len(model.feature_info) == 4
    for info, got in zip(model.feature_info, maps, strict=True):
        seen = []
        handle = model.get_submodule(info["module"]).register_forward_hook(
            lambda module, args, y, seen=seen: seen.append(y)
        )
        model.forward_features(x)
        handle.remove()
        torch.testing.assert_close(got, seen[0])
    only = model.forward_intermediates(x, indices=2, intermediates_only=True)
    torch.testing.assert_close(only[0], maps[2])
    late, _ = model.forward_intermediates(x, indices=[1])
    torch.testing.assert_close(late, last)
    ran = []
    model.stages[-1].blocks[-1].register_forward_hook(lambda *args: ran.append(1))
    early, _ = model.forward_intermediates(x, indices=[1], stop_early=True)
    torch.testing.assert_close(early, maps[1])
    assert not ran
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_torch_fx(name: str) -> None:
    """Traced with a block as one node, as timm's and torchvision's extractors do it."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    from timm.models._features_fx import get_notrace_modules

    model = small(name).train()
    options = {"leaf_modules": list(get_notrace_modules())}
    nodes, _ = extraction.get_graph_node_names(model, tracer_kwargs=options)
    assert sum(".blocks." in node for node in nodes) == sum(len(s.blocks) for s in model.stages)
    traced = extraction.create_feature_extractor(
        model,
        train_return_nodes={nodes[-1]: "y"},
        eval_return_nodes=["head.fc"],
        tracer_kwargs=options,
        suppress_diff_warning=True,
    )
    x = images(name)
    y, expected = traced(x)["y"], model(x)
    torch.testing.assert_close(y, expected)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(y.square().sum(), list(traced.parameters())),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    by_trace = small(name, features_only=True, feature_cls="fx").eval()
    by_getter = small(name, features_only=True).eval()
    weights = {key.removeprefix("model."): v for key, v in by_getter.state_dict().items()}
    assert not by_trace.graph_module.load_state_dict(weights, strict=False).missing_keys
    for ours, theirs in zip(by_trace(x), by_getter(x), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_torchscript(name: str) -> None:
    model = small(name).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, images(name))
        x = images(name, batch=3)
        torch.testing.assert_close(traced(x), model(x))
    with pytest.raises(torch.jit.frontend.NotSupportedError):
        torch.jit.script(model)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_grad_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = small(name).train()
    x = images(name)

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))

    plain = gradients()
    model.set_grad_checkpointing()
    assert {block.recompute for block in model.stages[0].blocks} == {"all"}
    for ours, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_group_matcher_takes_every_parameter(name: str) -> None:
    from timm.models import group_parameters

    model = small(name)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        named = {key for group in groups.values() for key in group}
        assert named == {key for key, _ in model.named_parameters()}
        blocks = len(model.stages) if coarse else sum(len(stage.blocks) for stage in model.stages)
        assert len(groups) == blocks + 2  # and the stem, the head


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_dtype_device_and_other_channels(name: str) -> None:
    model = small(name, in_chans=1, dtype=torch.float64, drop_path_rate=0.2, drop_rate=0.1)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.stages[-1].blocks[-1].drop_path == 0.2
    assert model(torch.randn(1, 1, 32, 32, dtype=torch.float64)).dtype == torch.float64
    model.reset_classifier(3)
    assert model.get_classifier().weight.dtype == torch.float64


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_timm_trains_it(name: str) -> None:
    """timm's own pieces, as its train.py puts them together, on images of one colour a class."""
    from PIL import Image
    from timm.data import Mixup, create_transform, resolve_data_config
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3

    torch.manual_seed(0)
    model = small(name, num_classes=2, drop_path_rate=0.05).train()
    config = resolve_data_config({"input_size": (3, 32, 32)}, model=model)
    transform = create_transform(
        **config, is_training=True, auto_augment="rand-m5-mstd0.5-inc1", re_prob=0.25
    )
    optimizer = create_optimizer_v2(model, "adamw", lr=2e-2, weight_decay=0.05, layer_decay=0.9)
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert max(scales) == 1 and min(scales) < 0.9**2
    decayed = {group["weight_decay"] for group in optimizer.param_groups}
    assert decayed == {0.0, 0.05}
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=8, warmup_epochs=0)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=2)
    ema = ModelEmaV3(model, decay=0.5)
    colours = [(250, 120, 20), (0, 20, 90)]
    plain = create_transform(**config)
    clean = torch.stack([plain(Image.new("RGB", (40, 40), colour)) for colour in colours])

    def clean_loss(network: nn.Module) -> float:
        with torch.no_grad():
            return nn.functional.cross_entropy(network.eval()(clean), torch.arange(2)).item()

    before = clean_loss(copy.deepcopy(model))
    criterion = SoftTargetCrossEntropy()
    for step in range(80):
        labels = torch.arange(16) % 2
        x = torch.stack([transform(Image.new("RGB", (40, 40), colours[i])) for i in labels])
        x, target = mixup(x, labels)
        loss = criterion(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model, step=step)
        if step % 10 == 9:
            scheduler.step(step // 10 + 1)
    # Mixed targets keep the training loss up; images as they are tell what was learnt.
    assert clean_loss(ema.module) < 0.8 * before
    assert clean_loss(model) < 0.8 * before


def test_a_checkpoint_goes_through_timm(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = small("convnest_atto").eval()
    path = tmp_path / "model.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    other = small("convnest_atto", checkpoint_path=str(path)).eval()
    x = images("convnest_atto")
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    assert copy.deepcopy(other)(x).shape == (2, 7)
