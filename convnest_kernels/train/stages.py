"""A training step of one block at each stage shape of ConvNeSt-T: our backend against eager.

The trained model is small; this says what the backends do at the sizes that people train.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from convnest_kernels.models import VARIANTS
from convnest_kernels.modules import NestedBlock
from convnest_kernels.train.config import Config
from convnest_kernels.train.display import Display

MODEL = "convnest_tiny"
IMAGE_SIZE = 224
BATCH_SIZE = 8
ROUNDS = 4  # of one step each, in turn; the first warms up


def run(config: Config, label: str, display: Display) -> list[dict[str, Any]]:
    """Measure every stage, show the table and return its figures, in seconds a step."""
    variant = VARIANTS[MODEL]
    first = IMAGE_SIZE // variant["patch_size"]
    stages = []
    with display.bar("comparing: blocks of ConvNeSt-T", len(variant["dims"])):
        for stage, dim in enumerate(variant["dims"]):
            stages.append(_measure(config, dim, first >> stage))
            display.update(advance=1)
    rows = [
        [
            f"{stage['size']}x{stage['size']}, {stage['dim']} channels",
            f"{1e3 * stage['ours']:,.0f}",
            f"{1e3 * stage['eager']:,.0f}",
            f"{stage['speed_ratio']:.2f}x",
        ]
        for stage in stages
    ]
    dtype = str(config.dtype).removeprefix("torch.")
    title = f"One block of ConvNeSt-T, {dtype}: a training step of {BATCH_SIZE} images, median, ms"
    display.table(title, ["", label, "eager", "eager / ours"], rows)
    return stages


def _measure(config: Config, dim: int, size: int) -> dict[str, Any]:
    """Time ours and eager in turn on the same block and input."""
    device = torch.device(config.device)
    generator = torch.Generator().manual_seed(config.seed)
    x = torch.randn(BATCH_SIZE, dim, size, size, generator=generator)
    x = x.to(device, config.dtype, memory_format=torch.channels_last).requires_grad_()
    blocks = {
        "ours": NestedBlock(dim, backend=config.backend, recompute=config.recompute),
        "eager": NestedBlock(dim, backend="eager", recompute=config.recompute),
    }
    blocks["eager"].load_state_dict(blocks["ours"].state_dict())
    seconds: dict[str, list[float]] = {name: [] for name in blocks}
    for _ in range(ROUNDS):
        for name, block in blocks.items():
            seconds[name].append(_step(block.to(device), x))
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    ratio = medians["eager"] / medians["ours"]
    return {"dim": dim, "size": size, **medians, "speed_ratio": ratio, "samples": seconds}


def _step(block: NestedBlock, x: Tensor) -> float:
    """Seconds of a forward and backward pass."""
    _synchronize(x.device)
    start = time.perf_counter()
    y = block(x)
    torch.autograd.backward(y, torch.ones_like(y))
    _synchronize(x.device)
    elapsed = time.perf_counter() - start
    x.grad = None
    block.zero_grad()
    return elapsed


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
