"""DDP and FSDP2 on two CPU ranks: the numbers of one process with twice the batch."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from convnest_kernels import NestedBlock
from convnest_kernels.models import ConvNeSt
from tests.blocks import DESIGNS, make
from tests.ranks import WORLD, Ranks, ranks
from tests.small_models import small

__all__ = ["ranks"]  # a fixture

BATCH = 4
RECOMPUTE = ["none", "conv", "all"]

# FSDP2 says so of a module whose last operation permutes, as ours does from NHWC to NCHW. It is
# true, and concerns who writes into the result of a block in place, which our models do nowhere.
RETURNS_A_VIEW = "FSDP2-wrapped module"


# Everything below runs on a rank, or in the test's own process for comparison.


def build(dtype: torch.dtype = torch.float64, channels_last: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    model = small(**options).to(dtype)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def images(model: ConvNeSt, step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    weight = next(model.parameters())
    x = torch.randn(BATCH, model.in_chans, 64, 64, generator=generator, dtype=torch.float64)
    return x.to(weight.dtype), torch.randint(7, (BATCH,), generator=generator)


def mine(batch: Tensor) -> Tensor:
    """This rank's share of a batch."""
    return batch.chunk(WORLD)[dist.get_rank()]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every gradient by its plain name, put together from the ranks."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        plain = name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")
        found[plain] = whole(parameter.grad).double()
    return found


def alone(steps: int = 1, lr: float = 0.0, **options: Any) -> tuple[ConvNeSt, dict[str, Tensor]]:
    """The model after `steps` on whole batches in one process, and its last gradients."""
    model = build(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for step in range(steps):
        optimizer.zero_grad()
        x, y = images(model, step)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, gradients(model)


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


# Two sums in another order: float64 rounding, many times over.
FLOAT64 = {"rtol": 1e-9, "atol": 1e-10}


def shard(model: ConvNeSt, output_dtype: torch.dtype | None = None, **options: Any) -> Any:
    """Shard each block and the rest; only the whole model's output has a dtype of its own."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in model.modules():
        if isinstance(module, NestedBlock):
            fully_shard(module, mesh=mesh, **options)
    if output_dtype is not None:
        options["mp_policy"] = dataclasses.replace(options["mp_policy"], output_dtype=output_dtype)
    return fully_shard(model, mesh=mesh, **options)


def checkpoint_blocks(model: nn.Module) -> None:
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=checkpoint_wrapper,
        check_fn=lambda module: isinstance(module, NestedBlock),
    )


def ddp_trains(options: dict[str, Any], checkpointed: bool = False) -> None:
    model = build(**options)
    if checkpointed:
        checkpoint_blocks(model)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        x, y = images(build(**options), step)
        F.cross_entropy(wrapped(mine(x)), mine(y)).backward()
        optimizer.step()
    reference, expected = alone(3, 0.1, **options)
    assert_equal(gradients(wrapped), expected, **FLOAT64)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **FLOAT64)


def fsdp_trains(options: dict[str, Any], checkpointed: bool = False, reshard: bool = True) -> None:
    warnings.filterwarnings("ignore", RETURNS_A_VIEW)
    model = build(**options)
    if checkpointed:
        checkpoint_blocks(model)
    shard(model, reshard_after_forward=reshard)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        x, y = images(build(**options), step)
        F.cross_entropy(model(mine(x)), mine(y)).backward()
        optimizer.step()
    reference, expected = alone(3, 0.1, **options)
    assert_equal(gradients(model), expected, **FLOAT64)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert isinstance(ours, DTensor)
        torch.testing.assert_close(ours.full_tensor(), theirs.detach(), **FLOAT64)


def ddp_buckets(options: dict[str, Any]) -> None:
    model = build(**options)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=0.004)
    parameters = list(model.parameters())
    places = []
    for step in range(3):
        wrapped.zero_grad(set_to_none=False)
        x, y = images(model, step)
        F.cross_entropy(wrapped(mine(x)), mine(y)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.stride() == parameter.stride(), name
        places.append([p.grad.data_ptr() for p in parameters])
        buckets = {p.grad.untyped_storage().data_ptr() for p in parameters}
    # The first step has one bucket and finds out in which order gradients arrive.
    assert 1 < len(buckets) < len(parameters) / 2
    assert places[1] == places[2]


class OtherStrides(torch.autograd.Function):
    """A gradient [C, 1, k, k] that counts as channels_last beside a contiguous weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.sum()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * torch.ones(4, 3, 3, 1, dtype=dy.dtype).permute(0, 3, 1, 2)


class Planted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return OtherStrides.apply(self.weight) * x


def ddp_planted_strides() -> list[str]:
    wrapped = DistributedDataParallel(Planted())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped(torch.ones(())).backward()
    return [str(warning.message) for warning in caught]


def ddp_block(design: str) -> None:
    def block() -> NestedBlock:
        torch.manual_seed(1)
        return make(design=design)

    generator = torch.Generator().manual_seed(2)
    x = torch.randn(BATCH, 5, 6, 7, generator=generator, dtype=torch.float64)
    wrapped = DistributedDataParallel(block(), gradient_as_bucket_view=True)
    inputs = mine(x).clone().requires_grad_()
    wrapped(inputs).square().mean().backward()
    expected, whole_batch = block(), x.clone().requires_grad_()
    expected(whole_batch).square().mean().backward()
    assert_equal(gradients(wrapped), gradients(expected), **FLOAT64)
    assert inputs.grad is not None and whole_batch.grad is not None
    torch.testing.assert_close(inputs.grad / WORLD, mine(whole_batch.grad), **FLOAT64)


def ddp_no_sync() -> None:
    model = build()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    x, y = (mine(part).chunk(2) for part in images(model))
    with wrapped.no_sync():
        (F.cross_entropy(wrapped(x[0]), y[0]) / 2).backward()
    (F.cross_entropy(wrapped(x[1]), y[1]) / 2).backward()
    assert_equal(gradients(wrapped), alone()[1], **FLOAT64)


def ddp_drop_path() -> None:
    model = build(drop_path_rate=0.5)
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    for step in range(3):  # a parameter without a gradient would stop the second
        torch.manual_seed(10 * step + dist.get_rank())
        wrapped.zero_grad()
        x, y = images(model, step)
        F.cross_entropy(wrapped(mine(x)), mine(y)).backward()
    sums = torch.stack([grad.sum() for grad in gradients(wrapped).values()])
    assert sums.isfinite().all()
    others = [torch.empty_like(sums) for _ in range(WORLD)]
    dist.all_gather(others, sums)
    assert torch.equal(others[0], others[1])


def autocast_gradients(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of bfloat16 training on two ranks, and in float64 in one process."""
    warnings.filterwarnings("ignore", RETURNS_A_VIEW)
    model: Any = build(torch.float32)
    x, y = (mine(part) for part in images(model))
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
        with torch.autocast("cpu", torch.bfloat16):
            logits = wrapped(x)
    else:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        wrapped = shard(model, torch.float32 if kind == "fsdp-output" else None, mp_policy=policy)
        logits = wrapped(x)
    assert logits.dtype == (torch.float32 if kind == "fsdp-output" else torch.bfloat16)
    F.cross_entropy(logits.float(), y).backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32
    return gradients(wrapped), alone()[1]


def one_process_bfloat16(kind: str) -> dict[str, Tensor]:
    """What rounds alike: autocast, or parameters and images in bfloat16, as FSDP2's policy."""
    model = build(torch.float32 if kind == "ddp" else torch.bfloat16)
    x, y = images(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "ddp"):
        logits = model(x)
    F.cross_entropy(logits.float(), y).backward()
    return gradients(model)


def fsdp_shards_a_part_of_a_block() -> str:
    model = build()
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x, _ = images(build())
    try:
        model(x)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return str(error)
    return ""


# The tests.


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_ddp_equals_one_process(ranks: Ranks, channels_last: bool, recompute: str) -> None:
    ranks(ddp_trains, {"channels_last": channels_last, "recompute": recompute})


def test_ddp_isotropic_and_grey_images(ranks: Ranks) -> None:
    ranks(ddp_trains, {"name": "convnest_iso_atto", "in_chans": 1})


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("run", [ddp_trains, fsdp_trains], ids=["ddp", "fsdp"])
def test_activation_checkpointing_composes(ranks: Ranks, run: Any, recompute: str) -> None:
    ranks(run, {"recompute": recompute}, True)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_ddp_gradients_keep_their_buckets(ranks: Ranks, channels_last: bool) -> None:
    ranks(ddp_buckets, {"channels_last": channels_last})


def test_a_gradient_of_other_strides_would_be_seen(ranks: Ranks) -> None:
    """The other tests turn warnings into errors; this is the one they watch for."""
    for messages in ranks(ddp_planted_strides):
        assert any("strides do not match" in message for message in messages), messages


@pytest.mark.parametrize("design", DESIGNS)
def test_ddp_block(ranks: Ranks, design: str) -> None:
    ranks(ddp_block, design)


def test_ddp_accumulates(ranks: Ranks) -> None:
    ranks(ddp_no_sync)


def test_ddp_with_stochastic_depth_finds_every_parameter(ranks: Ranks) -> None:
    ranks(ddp_drop_path)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_fsdp_equals_one_process(ranks: Ranks, recompute: str) -> None:
    ranks(fsdp_trains, {"recompute": recompute})


def test_fsdp_that_keeps_what_it_gathered(ranks: Ranks) -> None:
    ranks(fsdp_trains, {"name": "convnest_iso_atto"}, False, False)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp-output"])
def test_mixed_precision(ranks: Ranks, kind: str) -> None:
    """No further from float64 than twice what one process in bfloat16 is, for each weight."""
    baseline = one_process_bfloat16(kind)
    for ours, truth in ranks(autocast_gradients, kind):
        assert ours.keys() == truth.keys() == baseline.keys()
        for name, value in truth.items():
            scale = value.norm()
            error, usual = (ours[name] - value).norm(), (baseline[name] - value).norm()
            assert error <= 2 * usual + 0.02 * scale, (name, error / scale, usual / scale)


def test_fsdp_of_a_part_of_a_block_is_refused(ranks: Ranks) -> None:
    """A block reads the weights of its layers, whose own forward, and gathering, never runs."""
    for message in ranks(fsdp_shards_a_part_of_a_block):
        assert "DTensor" in message
