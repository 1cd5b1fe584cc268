"""block: a NestedBlock with the paper's 12× expansion and 7×7 kernel, at a stage's C and map."""

from __future__ import annotations

import zlib

import torch
from torch import nn

from bench import nchw
from bench.cells import Cell
from bench.limits import taps_inside
from bench.work import Cost, Work
from convnest_kernels import NestedBlock


def make_block(dim: int, cell: Cell, backend: str) -> NestedBlock:
    """A block with parameters as trained networks have them, the same for every backend."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"block-{dim}".encode()))
    block = NestedBlock(dim, backend=backend)
    with torch.no_grad():
        for name, p in block.named_parameters():
            drawn = torch.randn(p.shape, generator=generator)
            if p.dim() > 1:
                p.copy_(drawn / p[0].numel() ** 0.5)
            else:
                p.copy_(0.2 * drawn + float(name in ("norm.weight", "norm2.weight", "res_scale")))
    return block.to(cell.device, cell.torch_dtype)


def block_cost(cell: Cell, dim: int, height: int, width: int) -> Cost:
    """x in and y out; in training dy and x in again and dx out."""
    wide, pixels = 12 * dim, cell.batch * height * width
    size = cell.torch_dtype.itemsize
    return Cost(
        linear_flops=4 * pixels * dim * wide,
        conv_flops=2 * cell.batch * wide * taps_inside(height, 7) * taps_inside(width, 7),
        gelus=2 * pixels * wide,
        bytes_infer=(2 * pixels * dim + 2 * wide * dim) * size,
        bytes_train=(5 * pixels * dim + 4 * wide * dim) * size,
    )


def build(cell: Cell) -> Work:
    """One block of the stage."""
    stage = cell.shape
    eager = make_block(stage.dim, cell, "eager")
    forms: dict[str, nn.Module] = {"nhwc": eager, "nchw": nchw.Block(eager)}
    generator = torch.Generator().manual_seed(0)
    x, dy = (
        torch.randn(
            cell.batch, stage.dim, stage.height, stage.width, generator=generator
        ).to(cell.device, cell.torch_dtype, memory_format=torch.channels_last)
        for _ in range(2)
    )  # fmt: skip
    return Work(
        cell,
        forms,
        (x,),
        dy,
        block_cost(cell, stage.dim, stage.height, stage.width),
        make_ours=lambda backend: make_block(stage.dim, cell, backend),
        baselines={},
    )
