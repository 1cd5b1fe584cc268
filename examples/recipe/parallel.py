"""One process or many: joining torchrun's group, DDP, FSDP2, and sums over the ranks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from convnest_kernels import NestedBlock
from convnest_kernels.train.errors import UsageError


@dataclass(frozen=True)
class Ranks:
    """This process among `world` others, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes files."""
        return self.rank == 0

    def mean(self, values: list[float]) -> list[float]:
        """The mean of each value over the ranks."""
        return [value / self.world for value in self.sum(torch.tensor(values)).tolist()]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, in float64."""
        total = tensor.to(self.device, torch.float64, copy=True)
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def gather(self, value: list[Any]) -> list[Any]:
        """The lists of all ranks, joined."""
        if self.world == 1:
            return value
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, value)
        return [item for part in parts for item in part]


@contextmanager
def joined(device: str | None) -> Iterator[Ranks]:
    """Join the group that torchrun announces in the environment; without one, be alone."""
    mine = False
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if _uses_cuda(device) else "gloo")
        mine = True
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    try:
        yield Ranks(rank, world, _device(device))
    finally:
        if mine:
            dist.destroy_process_group()


def _uses_cuda(device: str | None) -> bool:
    return torch.cuda.is_available() if device is None else device.startswith("cuda")


def _device(name: str | None) -> torch.device:
    if not _uses_cuda(name):
        return torch.device(name or "cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def wrap(model: nn.Module, ranks: Ranks, kind: str, dtype: str) -> nn.Module:
    """Make a model train on all ranks: "ddp" copies it to each, "fsdp" shards its parameters.

    FSDP2 shards each NestedBlock as one unit, since a block reads the weights of its layers.
    """
    if kind == "fsdp":
        if not dist.is_initialized():
            raise UsageError("--parallel fsdp needs ranks to shard over: start it with torchrun")
        return _shard(model, ranks, dtype)
    if ranks.world == 1:
        return model
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def _shard(model: nn.Module, ranks: Ranks, dtype: str) -> nn.Module:
    # True of any block that ends in a permutation, and of concern to who writes into its result
    # in place; nothing here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    policy = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, NestedBlock):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def autocast(model: nn.Module, ranks: Ranks, dtype: str) -> AbstractContextManager[Any]:
    """bfloat16 activations beside float32 parameters; FSDP2's own policy sees to that by itself."""
    if dtype != "bfloat16" or isinstance(model, FSDPModule):
        return nullcontext()
    return torch.autocast(ranks.device.type, torch.bfloat16)


@contextmanager
def syncing(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Add gradients up over the ranks in this backward, or (accumulating) only in a later one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together (all ranks must call), any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor sharded, or moved, as `like` is."""
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)


class Share(Dataset[Any]):
    """A rank's share of a data set to evaluate on: (item, whether it counts).

    All ranks get equally many, so that they meet in every collective; what fills up does not
    count.
    """

    def __init__(self, dataset: Any, ranks: Ranks) -> None:
        self.dataset, self.ranks = dataset, ranks

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.ranks.world)

    def __getitem__(self, i: int) -> tuple[Any, bool]:
        index = i * self.ranks.world + self.ranks.rank
        counts = index < len(self.dataset)
        return self.dataset[index if counts else 0], counts
