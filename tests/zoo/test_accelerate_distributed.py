"""`accelerate` before and after DDP and FSDP2 on two CPU ranks: the numbers of one process."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from convnest_kernels import accelerate
from convnest_kernels.adopt import AccelerateError
from convnest_kernels.adopt import fused as fused_module
from convnest_kernels.adopt.families import family_of
from tests.ranks import WORLD, Ranks, ranks
from tests.zoo.models import BLOCKS, make

pytest.importorskip("timm", reason="timm is not installed")

__all__ = ["ranks"]  # a fixture

BATCH, STEPS, LR = 4, 2, 0.05
NAMES = ["timm", "timm-v2", "torchvision", "transformers", "transformers-v2", "dinov3"]
FLOAT64 = {"rtol": 1e-8, "atol": 1e-9}  # sums in another order, many times over


# Everything below runs on a rank.


def build(name: str) -> Any:
    torch.manual_seed(0)
    return make(name)


def images(step: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 3, 64, 64, generator=generator).to(dtype)


def mine(batch: Tensor) -> Tensor:
    return batch.chunk(WORLD)[dist.get_rank()]


def loss(y: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, y.shape[-1], dtype=torch.float64)
    return (y.double() * weights).square().sum(-1).mean()


def wrap(model: nn.Module, kind: str, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    if kind == "DDP":
        # A parameter without a gradient, or one of other strides than its bucket's, would be seen.
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    mesh = init_device_mesh("cpu", (WORLD,))
    options = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
    for module in list(model.modules()):
        is_unit = family_of(module) is not None
        if kind == "FSDP2-parts":
            is_unit = isinstance(module, (nn.Linear, nn.Conv2d))
        if is_unit:
            fully_shard(module, **options)
    return fully_shard(model, **options)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            plain = name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")
            grad = parameter.grad
            found[plain] = getattr(grad, "full_tensor", lambda grad=grad: grad)()
    return found


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """The calls of our convolution and norm."""
    calls: list[int] = []
    ours = fused_module.conv_norm

    def spy(*args: Any) -> Tensor:
        calls.append(1)
        return ours(*args)

    with mock.patch.object(fused_module, "conv_norm", spy):
        yield calls


def train(model: nn.Module, dtype: torch.dtype, share: bool) -> dict[str, Tensor]:
    """A few steps of SGD; the last gradients."""
    optimizer = torch.optim.SGD(model.parameters(), LR)
    for step in range(STEPS):
        optimizer.zero_grad()
        x = images(step, dtype)
        loss(model(mine(x) if share else x)).backward()
        optimizer.step()
    return gradients(model)


def forgive() -> None:
    # FSDP2 says that a block "returned a view tensor", of any library's block; and transformers'
    # last norm, and torch's functional collectives, have things of their own to say.
    for message in ("FSDP2-wrapped module", ".*unused.*"):
        warnings.filterwarnings("ignore", message)


def equals_one_process(name: str, kind: str, first: str, checkpointed: bool) -> int:
    """Train in both ways; returns how often ours ran on this rank."""
    forgive()
    expected = train(build(name).double(), torch.float64, share=False)
    model = build(name).double()
    if checkpointed:
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=checkpoint_wrapper,
            check_fn=lambda module: family_of(module) is not None,
        )
    if first == "accelerate":
        report = accelerate(model, strict=True)
        model = wrap(model, kind)
    else:
        model = wrap(model, kind)
        report = accelerate(model, strict=True)
    assert len(report.replaced) == BLOCKS
    with counted() as calls:
        got = train(model, torch.float64, share=True)
    compare(got, expected)
    for parameter in model.parameters():
        if kind == "DDP" and parameter.grad is not None:
            assert parameter.grad.stride() == parameter.stride()
    report.undo()
    # torch's own convolution gives a gradient of other strides than its weight's.
    warnings.filterwarnings("ignore", "Grad strides do not match")
    with counted() as later:
        train(model, torch.float64, share=True)
    assert not later, "undo left ours in place"
    return len(calls)


def compare(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            got[key], value, **FLOAT64, msg=lambda text, key=key: f"{key}: {text}"
        )


def low_precision(kind: str, accelerated: bool) -> dict[str, Tensor]:
    """Gradients of one step in bfloat16: by autocast under DDP, by FSDP2's policy."""
    forgive()
    model = build("timm")
    if accelerated:
        accelerate(model, strict=True)
    else:
        warnings.filterwarnings("ignore", "Grad strides do not match")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = wrap(model, kind, policy)
    x = mine(images(0, torch.float32))
    with counted() as calls, torch.autocast("cpu", torch.bfloat16, enabled=kind == "DDP"):
        y = model(x)
    assert y.dtype == torch.bfloat16 and len(calls) == (BLOCKS if accelerated else 0)
    loss(y).backward()
    return gradients(model)


def one_step_in_float64() -> dict[str, Tensor]:
    model = build("timm").double()
    loss(model(images(0, torch.float64))).backward()
    return gradients(model)


# The tests.


@pytest.mark.parametrize("first", ["accelerate", "wrap"])
@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one_process(ranks: Ranks, name: str, kind: str, first: str) -> None:
    assert ranks(equals_one_process, name, kind, first, False) == [STEPS * BLOCKS] * WORLD


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_activation_checkpointing_composes(ranks: Ranks, kind: str) -> None:
    """Every block runs twice."""
    for first in ("accelerate", "wrap"):
        assert ranks(equals_one_process, "timm", kind, first, True) == [2 * STEPS * BLOCKS] * WORLD


def test_where_parts_of_a_block_are_sharded_the_library_runs(ranks: Ranks) -> None:
    """FSDP2 gathers a layer's weights in that layer's own forward, which ours would not call."""
    assert ranks(equals_one_process, "timm", "FSDP2-parts", "accelerate", False) == [0] * WORLD
    with pytest.raises(AccelerateError, match=r"stages\.2\.blocks\.1: .*is a FSDPConv2d, not an"):
        ranks(equals_one_process, "timm", "FSDP2-parts", "wrap", False)


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_mixed_precision(ranks: Ranks, kind: str) -> None:
    """As far from float64 as the library's own blocks are, all gradients together."""
    (ours, _), (theirs, _) = (ranks(low_precision, kind, on) for on in (True, False))
    truth = one_step_in_float64()
    total = {"ours": 0.0, "theirs": 0.0}
    for name, value in truth.items():
        assert ours[name].dtype == theirs[name].dtype == torch.float32
        of_ours, of_theirs = ((g[name].double() - value).norm() for g in (ours, theirs))
        floor = torch.finfo(torch.bfloat16).eps * value.norm()
        assert of_ours <= 4 * of_theirs + floor, (name, of_ours, of_theirs)
        total["ours"] += (of_ours / value.norm()).item() ** 2
        total["theirs"] += (of_theirs / value.norm()).item() ** 2
    assert total["ours"] <= 1.5 * total["theirs"], total
