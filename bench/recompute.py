"""Time of a training step and bytes held for backward, for each `recompute` of nested_block.

    python -m bench.recompute [--batch 8] [--dtype float32]

Modes take turns in one process, on one thread; times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from convnest_kernels import NestedBlock

MODES = ("none", "conv", "all")
STAGES = ((48, 56), (96, 28), (192, 14), (384, 7))  # ConvNeSt-T at 224²: channels, map


def bytes_held(block: NestedBlock, x: Tensor) -> int:
    """What autograd keeps between forward and backward, parameters not counted."""
    parameters = {p.data_ptr() for p in block.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            held[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x)
    return sum(held.values())


def measure(dim: int, size: int, batch: int, dtype: torch.dtype, rounds: int) -> list[str]:
    """One line of the table: ratio to "none" and narrow tensors held, for each mode."""
    block = NestedBlock(dim).to(dtype)
    x = torch.randn(batch, dim, size, size).to(dtype, memory_format=torch.channels_last)
    x.requires_grad_()
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    held = {}
    for i in range(rounds + 1):
        for mode in MODES:
            block.recompute = mode
            start = time.perf_counter()
            block(x).sum().backward()
            if i > 0:
                times[mode].append(time.perf_counter() - start)
            else:
                held[mode] = bytes_held(block, x) / x.nbytes
    seconds = {mode: statistics.median(found) for mode, found in times.items()}
    cells = [f"{1e3 * seconds['none'] / batch:.2f}"]
    cells += [f"{seconds[mode] / seconds['none']:.2f}" for mode in MODES[1:]]
    return [*cells, *(f"{held[mode]:.1f}" for mode in MODES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| stage | none, ms an image | conv / none | all / none | held: none | conv | all |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for dim, size in STAGES:
        cells = measure(dim, size, args.batch, getattr(torch, args.dtype), args.rounds)
        print(f"| {size}×{size}, {dim} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
