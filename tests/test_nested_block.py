"""NestedBlock: every design's numbers against a formula of its own."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convnest_kernels import NestedBlock
from tests.blocks import (  # noqa: F401 (one_thread is a fixture of every test here)
    DESIGNS,
    NORMS,
    assert_same,
    formula,
    make,
    one_thread,
    run,
    run_formula,
)
from tests.tolerances import assert_accurate

SHORTCUTS = [  # res_scale, layer_scale
    (1.0, None),
    (None, None),
    (None, 0.5),
    (0.7, 0.1),
]


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("norms", NORMS, ids="-".join)
@pytest.mark.parametrize(
    ("design", "shortcut"), [*((design, True) for design in DESIGNS), ("convnest", False)]
)
def test_designs_follow_the_formula(
    design: str, shortcut: bool, norms: tuple[str, str], backend: str | None
) -> None:
    for res_scale, layer_scale in SHORTCUTS:
        block = make(
            design=design,
            norm=norms,
            shortcut=shortcut,
            res_scale=res_scale,
            layer_scale=layer_scale,
            backend=backend,
        )
        x = torch.randn(2, 5, 4, 6, dtype=torch.float64)
        dy = torch.randn_like(x)
        theirs = run_formula(block, x, dy, norms, shortcut)
        assert_same(run(block, x, dy), theirs, rtol=1e-9, atol=1e-10)


def test_padding_comes_after_the_norm() -> None:
    block = make()
    with torch.no_grad():
        block.norm.bias.fill_(10)  # zeros put in before the norm would come out as 10
    x = torch.randn(1, 5, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(block(x), formula(block, x, ("layer", "layer"), True))


def test_convnest_without_shortcut_is_post_norm() -> None:
    block = make(shortcut=False)
    other = make(design="post_norm")
    other.load_state_dict(block.state_dict())
    x, dy = torch.randn(2, 2, 5, 4, 4, dtype=torch.float64)
    assert_same(run(block, x, dy), run(other, x, dy), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("design", DESIGNS)
def test_backends_agree(design: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"design": design, "expansion": 12, "kernel_size": 7}
    block = make(6, dtype=dtype, **options)
    eager = NestedBlock(6, backend="eager", **options).to(dtype)
    truth = NestedBlock(6, backend="eager", **options).double()
    for other in (eager, truth):
        other.load_state_dict(block.state_dict())
    x, dy = torch.randn(2, 2, 6, 9, 5).to(dtype)
    true = run(truth, x.double(), dy.double())
    theirs = run(eager, x, dy)
    for name, ours in run(block, x, dy).items():
        assert_accurate(name, ours, theirs[name], true[name], rows=90)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("design", DESIGNS)
def test_parameters_may_stay_float32(design: str, drop_path: float, dtype: torch.dtype) -> None:
    block = make(dtype=torch.float32, design=design, drop_path=drop_path, layer_scale=1.0)
    low = copy.deepcopy(block).to(dtype)
    x, dy = torch.randn(2, 8, 5, 4, 4).to(dtype)
    torch.manual_seed(0)
    ours = run(block, x, dy)
    torch.manual_seed(0)
    theirs = run(low, x, dy)
    for name, value in ours.items():
        assert value.dtype == (dtype if name in "xy" else torch.float32)
        error = (value - theirs[name]).abs().max() / theirs[name].abs().max()
        assert error < 32 * torch.finfo(dtype).eps, name


def test_state_dict_has_timms_names_and_crosses_backends() -> None:
    block = NestedBlock(8, layer_scale=0.1)
    shapes = {name: list(value.shape) for name, value in block.state_dict().items()}
    assert shapes == {
        "gamma": [8],
        "res_scale": [8],
        "conv_dw.weight": [96, 1, 7, 7],
        "conv_dw.bias": [96],
        "norm.weight": [96],
        "norm.bias": [96],
        "mlp.fc1.weight": [96, 8],
        "mlp.fc1.bias": [96],
        "mlp.fc2.weight": [8, 96],
        "mlp.fc2.bias": [8],
        "norm2.weight": [8],
        "norm2.bias": [8],
    }
    for design, norms in itertools.product(DESIGNS, NORMS):
        block = make(design=design, norm=norms, dtype=torch.float32)
        eager = make(design=design, norm=norms, dtype=torch.float32, backend="eager")
        eager.load_state_dict(block.state_dict(), strict=True)
        x = torch.randn(2, 5, 4, 4)
        torch.testing.assert_close(block(x), eager(x), rtol=1e-4, atol=1e-4)
        block.load_state_dict(eager.state_dict(), strict=True)


def test_initial_values() -> None:
    block = NestedBlock(64, res_scale=0.5, layer_scale=1e-6)
    for weight in (block.conv_dw.weight, block.mlp.fc1.weight, block.mlp.fc2.weight):
        assert abs(weight.std().item() - 0.02) < 0.001
        assert abs(weight.mean().item()) < 0.001
    for bias in (block.conv_dw.bias, block.mlp.fc1.bias, block.mlp.fc2.bias):
        assert not bias.any()
    assert (block.res_scale == 0.5).all()
    assert (block.gamma == 1e-6).all()


# Stochastic depth.


@pytest.mark.parametrize("design", DESIGNS)
def test_drop_path_drops_whole_branches_and_scales_the_others(design: str) -> None:
    p, n = 0.3, 4000
    block = make(3, expansion=2, design=design, drop_path=p, layer_scale=0.5)
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64).expand(n, 3, 2, 2)
    shortcut = block.res_scale[:, None, None] * x
    branch = block.eval()(x) - shortcut  # after norm2 where the norm comes last
    dropped = block.train()(x) - shortcut
    ratio = dropped / branch
    keeps = (ratio[:, :1, :1, :1] > 0.5).expand_as(ratio)
    torch.testing.assert_close(ratio[keeps], torch.full_like(ratio[keeps], 1 / (1 - p)))
    torch.testing.assert_close(dropped[~keeps], torch.zeros_like(dropped[~keeps]))
    share = keeps.double().mean().item()
    assert abs(share - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize("recompute", ["none", "conv", "all"])
@pytest.mark.parametrize("norms", NORMS, ids="-".join)
def test_drop_path_is_determined_by_the_seed(norms: tuple[str, str], recompute: str) -> None:
    block = make(drop_path=0.5, norm=norms, recompute=recompute)
    x, dy = torch.randn(2, 16, 5, 3, 3, dtype=torch.float64)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(run(block, x, dy))
    assert_same(results[0], results[1], rtol=0, atol=0)
    assert not torch.equal(results[0]["y"], results[2]["y"])

    # Other ways of running draw the same samples.
    plain = copy.deepcopy(block)
    plain.recompute, plain.backend = "none", "eager"
    torch.manual_seed(0)
    assert_same(results[0], run(plain, x, dy), rtol=1e-9, atol=1e-10)


def test_drop_path_gradient_matches_the_samples_kept() -> None:
    block = make(drop_path=0.5, layer_scale=0.3)
    x, dy = torch.randn(2, 8, 5, 3, 3, dtype=torch.float64)
    torch.manual_seed(0)
    ours = run(block, x, dy)
    torch.manual_seed(0)
    keep = torch.empty(8, 1, 1, 1, dtype=torch.float64).bernoulli_(0.5) / 0.5
    assert keep.unique().numel() == 2

    x = x.requires_grad_()
    shortcut = block.res_scale[:, None, None] * x
    y = shortcut + keep * (formula(block, x, ("layer", "layer"), True) - shortcut)
    grads = torch.autograd.grad(y, (x, *block.parameters()), dy)
    for (name, value), grad in zip(list(ours.items())[1:], grads, strict=True):
        torch.testing.assert_close(value, grad, msg=lambda text, name=name: f"{name}: {text}")


# Batch norms.


@pytest.mark.parametrize("recompute", ["none", "conv", "all"])
@pytest.mark.parametrize("norms", [n for n in NORMS if "batch" in n], ids="-".join)
@pytest.mark.parametrize("design", DESIGNS)
def test_batch_norm_trains_and_evaluates(
    design: str, norms: tuple[str, str], recompute: str
) -> None:
    block = make(design=design, norm=norms, recompute=recompute)
    x, dy = torch.randn(2, 3, 5, 4, 4, dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    for name, kind in zip(("norm", "norm2"), norms, strict=True):
        if kind == "batch":
            module = block.get_submodule(name)
            module.register_forward_hook(
                lambda module, args, y, name=name: seen.update({name: args[0].detach()})
            )
    run(block, x, dy)
    assert len(seen) == norms.count("batch")
    for name, activation in seen.items():
        norm = block.get_submodule(name)
        assert norm.num_batches_tracked == 1
        variance, mean = torch.var_mean(activation, dim=(0, 2, 3))
        torch.testing.assert_close(norm.running_mean, 0.1 * mean)
        torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variance)

    block.eval()
    before = copy.deepcopy(block.state_dict())
    assert_same(run(block, x, dy), run_formula(block, x, dy, norms, True), rtol=1e-9, atol=1e-10)
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_sync_batch_norm_can_take_over() -> None:
    block = make(norm=("batch", "batch")).eval()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    assert isinstance(synced.norm, nn.SyncBatchNorm)
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(synced(x), block(x))
