"""model: a whole ConvNeSt in inference, beside timm's ConvNeXt of the same size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bench import nchw
from bench.block import block_cost
from bench.cases import stages
from bench.cells import Cell
from bench.work import Cost, Work
from convnest_kernels import NestedBlock
from convnest_kernels.models import create_model

# Of the same size by the paper's Table 4; iso models have no ConvNeXt of theirs below small.
CONVNEXT = {
    "convnest_atto": "convnext_atto",
    "convnest_femto": "convnext_femto",
    "convnest_pico": "convnext_pico",
    "convnest_nano": "convnext_nano",
    "convnest_tiny": "convnext_tiny",
    "convnest_small": "convnext_small",
    "convnest_base": "convnext_base",
}


def make_model(cell: Cell, backend: str) -> nn.Module:
    """The cell's variant from one seed, every block on a backend."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(cell.variant, backend=backend)
    # As drawn, a block adds next to nothing to its shortcut, and a wrong block would not show.
    for block in model.modules():
        if isinstance(block, NestedBlock):
            nn.init.normal_(block.conv_dw.weight, std=1 / block.kernel_size, generator=_seed())
    ours_contiguous = backend != "eager" and cell.memory_format == "contiguous"
    memory_format = torch.contiguous_format if ours_contiguous else torch.channels_last
    model = model.to(cell.device, cell.torch_dtype, memory_format=memory_format)
    return model.train(cell.mode == "train")


def _seed() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def network_cost(cell: Cell) -> Cost:
    """Blocks, patch convolutions between the stages and classifier; bytes: image in, weights."""
    total = [0.0] * 2
    gelus = 0.0
    before = 3
    patch = 16 if len(stages(cell.variant)) == 1 else 4
    for stage in stages(cell.variant, cell.image_size):
        one = block_cost(cell, stage.dim, stage.height, stage.width)
        pixels = cell.batch * stage.height * stage.width
        total[0] += stage.blocks * one.linear_flops + 2 * pixels * before * patch**2 * stage.dim
        total[1] += stage.blocks * one.conv_flops
        gelus += stage.blocks * one.gelus
        before, patch = stage.dim, 2
    total[0] += 2 * cell.batch * before * 1000
    size = cell.torch_dtype.itemsize
    bytes_ = cell.batch * 3 * cell.image_size**2 * size
    return Cost(total[0], total[1], gelus, bytes_, 2 * bytes_)


def baselines(cell: Cell) -> dict[str, Callable[[], nn.Module]]:
    """timm's ConvNeXt of the same size, in channels_last."""

    def convnext() -> nn.Module:
        import timm

        if cell.variant not in CONVNEXT:
            raise ImportError(f"timm has no ConvNeXt of the size of {cell.variant}")
        torch.manual_seed(0)
        model = timm.create_model(CONVNEXT[cell.variant])
        model = model.to(cell.device, cell.torch_dtype, memory_format=torch.channels_last)
        return model.train(cell.mode == "train")

    return {"convnext": convnext}


def build(cell: Cell) -> Work:
    """Images to logits."""
    eager = make_model(cell, "eager")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(cell.batch, 3, cell.image_size, cell.image_size, generator=generator)
    x = x.to(cell.device, cell.torch_dtype, memory_format=torch.channels_last)
    return Work(
        cell,
        {"nhwc": eager, "nchw": nchw.network(eager)},
        (x,),
        None,
        network_cost(cell),
        make_ours=lambda backend: make_model(cell, backend),
        baselines=baselines(cell),
    )
