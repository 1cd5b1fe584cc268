"""Opt-in tuning of the depthwise kernels: CONVNEST_AUTOTUNE=1.

Without it every tile comes from `heuristics`, and nothing is ever timed. With it, the first call of
a kernel with a new (dtype, channels, kernel size, bucket of sizes) times the candidates of
`candidates` and keeps the fastest, in this process and in one JSON file for each GPU, driver and
Triton under CONVNEST_CACHE_DIR (default: ~/.cache/convnest_kernels). Batch, height and width count
by their power of two, so that a new image size rarely tunes again. Nothing is tuned while a CUDA
graph is captured: what is not in the cache then comes from the heuristics.

Not `triton.autotune`: its key is every argument, and its disk cache knows nothing of the driver.
"""

from __future__ import annotations

import functools
import json
import os
import re
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton
from torch import Tensor

from convnest_kernels.triton.heuristics import ConvTile

_REPEATS = 20


def enabled() -> bool:
    """Whether CONVNEST_AUTOTUNE asks for tuning."""
    return os.environ.get("CONVNEST_AUTOTUNE", "0") == "1"


def candidates(tile: ConvTile) -> list[ConvTile]:
    """What is timed beside the heuristic's choice: the trades that a compiler cannot decide."""
    found = [tile]
    if tile.matrix and tile.wgrad_rows:
        # Twice the programs a multiprocessor, for a few spilled registers; twice the channels.
        found += [
            replace(tile, max_registers=128),
            replace(tile, block_c=16, num_warps=16, max_registers=128),
        ]
    elif tile.matrix:
        found += [replace(tile, num_stages=stages) for stages in (1, 3)]
        found += [replace(tile, block_c=16, num_warps=8)]
    else:
        found += [replace(tile, block_p=4, num_warps=8), replace(tile, block_p=1, num_warps=2)]
    return found


def choose(
    kernel: str,
    x: Tensor,
    kernel_size: int,
    tile: ConvTile,
    launch: Callable[[ConvTile], object],
) -> ConvTile:
    """Return the tile to launch `kernel` with: the heuristic's, or the fastest one if asked for."""
    if not enabled() or not x.is_cuda:
        return tile
    sizes = [(size - 1).bit_length() for size in x.shape[:-1]]
    key = "-".join(map(str, (kernel, x.dtype, x.shape[-1], kernel_size, *sizes)))
    path = cache_path(_device_key(x.device))
    known = _read(path)
    if key in known:
        return known[key]
    if torch.cuda.is_current_stream_capturing():
        return tile
    best = fastest(candidates(tile), launch, _measure)
    _write(path, key, best)
    _read.cache_clear()
    return best


def fastest(
    tiles: list[ConvTile],
    launch: Callable[[ConvTile], object],
    measure: Callable[[Callable[[], object]], float],
) -> ConvTile:
    """Return the tile whose launch takes least by `measure`, of those that fit."""
    times = {}
    for tile in tiles:
        try:
            times[tile] = measure(functools.partial(launch, tile))
        except triton.runtime.errors.OutOfResources:
            continue
    return min(times, key=lambda tile: times[tile], default=tiles[0])


def _measure(run: Callable[[], object]) -> float:
    """Median milliseconds of a few launches, the first ones (which compile) left out."""
    run()
    run()
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


@functools.cache
def _device_key(device: torch.device) -> str:
    driver = torch.version.hip or getattr(torch._C, "_cuda_getDriverVersion")()  # noqa: B009
    return f"{torch.cuda.get_device_name(device)}-{driver}-triton{triton.__version__}"


def cache_path(device_key: str) -> Path:
    """The JSON file of a GPU, driver and Triton version."""
    root = os.environ.get("CONVNEST_CACHE_DIR") or Path.home() / ".cache" / "convnest_kernels"
    return Path(root) / f"triton-{re.sub(r'[^A-Za-z0-9.]+', '_', device_key)}.json"


@functools.cache
def _read(path: Path) -> dict[str, ConvTile]:
    try:
        entries = json.loads(path.read_text())
        return {key: ConvTile(**fields) for key, fields in entries.items()}
    except (FileNotFoundError, json.JSONDecodeError, TypeError, AttributeError):
        return {}  # absent, truncated, or of another version: tune again


def _write(path: Path, key: str, tile: ConvTile) -> None:
    """Add an entry; the file is replaced whole, so that a reader never sees half of one."""
    _read.cache_clear()
    entries = {known: asdict(value) for known, value in _read(path).items()} | {key: asdict(tile)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(entries, file, indent=1)
    os.replace(file.name, path)
