"""The 14 models: counts against the paper's tables, and how they behave as backbones."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from convnest_kernels import NestedBlock, use_backend
from convnest_kernels.models import (
    EXPANSION_ABLATION,
    VARIANTS,
    ConvNeSt,
    create_model,
    list_models,
)
from tests.blocks import one_thread  # noqa: F401 (a fixture of every test here)
from tests.small_models import gradients, small

# Parameters in M and multiply-accumulates in G at 224 x 224, as printed.
TABLE_4 = {
    "convnest_atto": ("3.6", "0.67"),
    "convnest_femto": ("5.0", "0.90"),
    "convnest_pico": ("9", "1.5"),
    "convnest_nano": ("15", "2.7"),
    "convnest_tiny": ("27", "4.8"),
    "convnest_small": ("50", "9.0"),
    "convnest_base": ("90", "16.1"),
    "convnest_iso_atto": ("3.3", "0.62"),
    "convnest_iso_femto": ("4.1", "0.77"),
    "convnest_iso_pico": ("7", "1.2"),
    "convnest_iso_nano": ("11", "2.0"),
    "convnest_iso_tiny": ("15", "3.0"),
    "convnest_iso_small": ("23", "4.3"),
    "convnest_iso_base": ("84", "16.3"),
}
TABLE_2 = {
    4: ("28", "4.5"),
    6: ("29", "4.7"),
    8: ("28", "4.6"),
    10: ("28", "4.6"),
    12: ("28", "4.8"),
    16: ("28", "4.8"),
}

# Counts.


def count(**options: Any) -> tuple[float, float]:
    """Parameters in M, and multiply-accumulates in G of one 224 x 224 image.

    The latter are those of every convolution and linear layer, as the dispatcher sees them on the
    eager backend; norms, GELU, shortcuts and pooling are not counted, nor are biases.
    """
    with torch.device("meta"):
        model = create_model(**options, backend="eager")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fake = model.to_empty(device="cpu")
        with FlopCounterMode(display=False) as counter:
            fake(torch.empty(1, 3, 224, 224))
    parameters = sum(p.numel() for p in model.parameters())
    return parameters / 1e6, counter.get_total_flops() / 2e9


def assert_printed(value: float, printed: str) -> None:
    """`value` may differ from what the paper prints by less than one unit of its last digit.

    The paper rounds some figures (8.55 to 9, 0.665 to .67) and cuts off others (3.68 to 3.6, 5.08
    to 5.0, 0.908 to .90, 28.52 to 28): half a unit would refuse the latter.
    """
    exponent = Decimal(printed).as_tuple().exponent
    assert isinstance(exponent, int)
    assert abs(value - float(printed)) < 10.0**exponent, f"{value:.4f} is not {printed}"


@pytest.mark.parametrize("name", list(TABLE_4))
def test_counts_of_table_4(name: str) -> None:
    parameters, macs = count(name=name)
    assert_printed(parameters, TABLE_4[name][0])
    assert_printed(macs, TABLE_4[name][1])


@pytest.mark.parametrize("expansion", list(TABLE_2))
def test_counts_of_table_2(expansion: int) -> None:
    parameters, macs = count(name="convnest_tiny", **EXPANSION_ABLATION[expansion])
    assert_printed(parameters, TABLE_2[expansion][0])
    assert_printed(macs, TABLE_2[expansion][1])


def test_counts_to_two_decimals() -> None:
    def rounded(name: str) -> tuple[float, float]:
        parameters, macs = count(name=name)
        return round(parameters, 2), round(macs, 2)

    assert rounded("convnest_tiny") == (27.34, 4.78)
    # With a norm in the stem it would be 83.95: isotropic models have none.
    assert rounded("convnest_iso_base") == (83.94, 16.29)


def test_list_models() -> None:
    assert list_models() == list(TABLE_4) == list(VARIANTS)
    assert list_models("*_iso_*") == [name for name in TABLE_4 if "iso" in name]
    assert list_models("nothing") == []


# Architecture.


def test_names_are_timms() -> None:
    model = create_model("convnest_atto", num_classes=7, depths=(1, 1, 1, 1))
    names = {name: list(value.shape) for name, value in model.state_dict().items()}
    expected = {
        "stem.0.weight": [20, 3, 4, 4],
        "stem.1.weight": [20],
        "stages.1.downsample.0.weight": [20],
        "stages.1.downsample.1.weight": [40, 20, 2, 2],
        "stages.3.blocks.0.conv_dw.weight": [1920, 1, 7, 7],
        "stages.3.blocks.0.mlp.fc1.weight": [1920, 160],
        "head.norm.weight": [160],
        "head.fc.weight": [7, 160],
    }
    assert expected.items() <= names.items()
    iso = create_model("convnest_iso_atto", depths=(1,))
    names = {name: list(value.shape) for name, value in iso.state_dict().items()}
    assert names["stem.0.weight"] == [88, 3, 16, 16]
    assert "stem.1.weight" not in names
    assert names["stages.0.blocks.0.conv_dw.weight"] == [1056, 1, 7, 7]


@pytest.mark.parametrize("name", ["convnest_atto", "convnest_iso_atto"])
def test_res_scale_is_where_the_paper_has_it(name: str) -> None:
    for block_name, block in small(name).named_modules():
        if isinstance(block, NestedBlock):
            scaled = "iso" in name or block_name.startswith(("stages.2", "stages.3"))
            assert (block.res_scale is not None) == scaled, block_name
    plain = small(name, res_scale=None)
    assert not any("res_scale" in key for key in plain.state_dict())


def test_initial_values() -> None:
    model = create_model("convnest_atto", depths=(1, 1, 1, 1))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            spread = 4 * 0.02 / math.sqrt(2 * parameter.numel())
            assert abs(parameter.std().item() - 0.02) < spread, name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert (parameter == 1).all(), name


def test_drop_path_grows_linearly() -> None:
    model = small(drop_path_rate=0.4)
    rates = [m.drop_path for m in model.modules() if isinstance(m, NestedBlock)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    alone = small("convnest_iso_atto", depths=(1,), drop_path_rate=0.4)
    assert [m.drop_path for m in alone.modules() if isinstance(m, NestedBlock)] == [0]


@pytest.mark.parametrize("design", ["vanilla", "pre_activation", "post_norm", "convnest"])
def test_overrides_reach_every_block(design: str) -> None:
    model = small(
        design=design,
        norm=("layer", "batch"),
        kernel_size=5,
        layer_scale=0.5,
        expansion=2,
        eps=1e-5,
        backend="eager",
        recompute="conv",
    )
    blocks = [m for m in model.modules() if isinstance(m, NestedBlock)]
    assert len(blocks) == 5
    for block in blocks:
        assert (block.design, block.kernel_size, block.eps) == (design, 5, 1e-5)
        assert (block.backend, block.recompute) == ("eager", "conv")
        assert block.wide_dim == 2 * block.dim
        assert isinstance(block.norm2, nn.BatchNorm2d)
        assert block.gamma is not None
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    grads = gradients(model, torch.randn(4, 3, 64, 64))
    assert all(grad.any() for name, grad in grads.items() if name.endswith("weight"))


# Numbers.


def reference(model: ConvNeSt, x: Tensor) -> Tensor:
    """A hierarchical model written apart from the library, but for the (tested) blocks."""
    p = dict(model.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        shape = (-1, *[1] * (x.dim() - 2))
        weight, bias = p[f"{name}.weight"].view(shape), p[f"{name}.bias"].view(shape)
        return (x - mean) / (variance + 1e-6).sqrt() * weight + bias

    def patches(x: Tensor, name: str) -> Tensor:
        weight = p[f"{name}.weight"]
        k = weight.shape[-1]
        n, _, h, w = x.shape
        x = nn.functional.unfold(x[:, :, : h // k * k, : w // k * k], k, stride=k)
        y = weight.flatten(1) @ x + p[f"{name}.bias"][:, None]
        return y.view(n, -1, h // k, w // k)

    x = norm(patches(x, "stem.0"), "stem.1")
    for i, stage in enumerate(model.stages):
        if i:
            name = f"stages.{i}.downsample"
            x = patches(norm(x, f"{name}.0"), f"{name}.1")
        for block in stage.blocks:
            x = block(x)
    return norm(x.mean((2, 3)), "head.norm") @ p["head.fc.weight"].T + p["head.fc.bias"]


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (79, 101)])
def test_logits_and_gradients(size: tuple[int, int]) -> None:
    model = small().double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    ours = gradients(model, x)
    torch.testing.assert_close(model(x), reference(model, x))
    model.zero_grad()
    reference(model, x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, msg=name)


@pytest.mark.parametrize("name", ["convnest_atto", "convnest_iso_atto"])
def test_backends_agree(name: str) -> None:
    model, eager = small(name), small(name, backend="eager")
    eager.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 48)
    torch.testing.assert_close(model(x), eager(x), rtol=1e-4, atol=1e-4)
    theirs = gradients(eager, x)
    for key, grad in gradients(model, x).items():
        torch.testing.assert_close(grad, theirs[key], rtol=1e-3, atol=1e-3, msg=key)
    with use_backend("eager"):
        torch.testing.assert_close(model(x), eager(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["convnest_atto", "convnest_iso_atto"])
@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_blocks_see_channels_last(name: str, in_chans: int) -> None:
    model = small(name, in_chans=in_chans).double().eval()
    seen = []
    for module in model.modules():
        if isinstance(module, NestedBlock):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(2, in_chans, 64, 96, dtype=torch.float64)
    y = model(x)
    assert seen
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), y)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(x), y)


# Heads and features.


def test_head_can_be_left_out_and_replaced() -> None:
    model = small(num_classes=0).eval()
    x = torch.randn(2, 3, 32, 32)
    pooled = model(x)
    assert pooled.shape == (2, 16)
    assert isinstance(model.get_classifier(), nn.Identity)

    model.reset_classifier(5)
    assert model.num_classes == 5
    fc = model.get_classifier()
    assert isinstance(fc, nn.Linear)
    assert not fc.bias.any()
    assert fc.weight.std() < 0.03
    torch.testing.assert_close(model(x), fc(pooled))
    features = model.forward_features(x)
    assert features.shape == (2, 16, 1, 1)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    torch.testing.assert_close(model.forward_head(features), model(x))

    model.double().reset_classifier(3)
    assert model(x.double()).shape == (2, 3)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x.double()).float(), pooled)


def test_features_of_a_hierarchical_model() -> None:
    classifier = small().eval()
    model = small(features_only=True).eval()
    missing, unexpected = model.load_state_dict(classifier.state_dict(), strict=False)
    assert not missing
    assert all(name.startswith("head.") for name in unexpected)
    assert model.feature_info.channels() == [4, 8, 12, 16]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    outputs: dict[str, Tensor] = {}
    for name in model.feature_info.module_name():
        model.get_submodule(name).register_forward_hook(
            lambda module, args, y, name=name: outputs.update({name: y})
        )
    x = torch.randn(2, 3, 77, 90)
    maps = model(x)
    for i, (y, info) in enumerate(zip(maps, model.feature_info, strict=True)):
        stride = info["reduction"]
        assert y.shape == (2, info["num_chs"], 77 // stride, 90 // stride)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert outputs[info["module"]] is y
        torch.testing.assert_close(y, classifier.stages[: i + 1](classifier._embed(x)))
    torch.testing.assert_close(maps[-1], classifier.forward_features(x))
    sum(y.square().mean() for y in maps).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_features_of_an_isotropic_model() -> None:
    model = small("convnest_iso_atto", features_only=True).eval()  # of six blocks
    assert model.feature_info.channels() == [8] * 4
    assert model.feature_info.reduction() == [16] * 4
    assert model.feature_info.module_name() == [f"stages.0.blocks.{i}" for i in (1, 2, 4, 5)]
    x = torch.randn(1, 3, 40, 64)
    maps = model(x)
    assert [list(y.shape) for y in maps] == [[1, 8, 2, 4]] * 4
    torch.testing.assert_close(maps[-1], model.forward_features(x))
    shallow = small("convnest_iso_atto", depths=(2,), features_only=True)
    assert len(shallow(x)) == len(shallow.feature_info) == 2


def test_a_features_model_has_no_head() -> None:
    model = small(features_only=True)
    for call in (
        model.get_classifier,
        lambda: model.reset_classifier(3),
        lambda: model.forward_head(torch.randn(1, 16, 1, 1)),
    ):
        with pytest.raises(RuntimeError, match="features_only=True has no head"):
            call()


# Errors.


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"name must be .* got 'convnest_tinny'; did you mean"):
        create_model("convnest_tinny")
    with pytest.raises(ValueError, match=r"name must be one of convnest_atto, .* got 'resnet50'$"):
        create_model("resnet50")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
        ({"num_classes": 1.0}, "num_classes must be an int, got 1.0"),
        ({"in_chans": 0}, "in_chans must be at least 1, got 0"),
        ({"drop_path_rate": 1}, r"drop_path_rate must be in \[0, 1\), got 1"),
        ({"dims": 8}, "dims must be a sequence with one int per stage, got 8"),
        ({"dims": (8, 0, 8, 8)}, r"dims\[1\] must be at least 1, got 0"),
        ({"depths": (1, 1, 1.5, 1)}, r"depths\[2\] must be an int, got 1.5"),
        ({"depths": (1, 1)}, r"depths must have one entry per stage, 4, got \(1, 1\)"),
        ({"res_scale": (1.0,)}, r"res_scale must have one entry per stage, 4, got \(1.0,\)"),
        ({"design": "resnet"}, "design must be one of"),
        ({"recompute": "some"}, "recompute must be one of"),
        ({"backend": "tpu"}, "backend must be one of"),
        ({"width": 3}, "unexpected keyword argument 'width'"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        small(**options)


@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        ("convnest_atto", torch.zeros(1, 3, 31, 64), "at least 32 x 32 pixels.* got 31 x 64"),
        ("convnest_iso_atto", torch.zeros(1, 3, 64, 15), "at least 16 x 16 pixels.* got 64 x 15"),
        ("convnest_atto", torch.zeros(1, 1, 64, 64), r"x must be \[N, 3, H, W\], got \[1, 1"),
        ("convnest_atto", torch.zeros(3, 64, 64), r"x must be \[N, 3, H, W\], got \[3, 64"),
        ("convnest_atto", torch.zeros(1, 3, 64, 64).byte(), "x must be floating point.*uint8"),
    ],
)
def test_a_wrong_image_is_an_error(name: str, x: Tensor, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        small(name)(x)
