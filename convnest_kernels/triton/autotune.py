"""Opt-in tuning of the depthwise kernels: CONVNEST_AUTOTUNE=1.

Without it every tile comes from `heuristics`, and nothing is ever timed. With it, the first call of
a kernel with a new (dtype, channels, kernel size, bucket of sizes) times the candidates of
`candidates` and keeps the fastest, in this process and on disk: one directory for each GPU, driver,
Triton and version of this package under CONVNEST_CACHE_DIR (default: ~/.cache/convnest_kernels),
one small file for each key. So two processes that tune at once never write over each other's
results: a file is replaced whole, and nothing is read to be written back. Batch, height and width
count by their power of two, so that a new image size rarely tunes again. Nothing is tuned while a
CUDA graph is captured: what is not known then comes from the heuristics.

Not `triton.autotune`: its key is every argument, and its disk cache knows nothing of the driver.
"""

from __future__ import annotations

import functools
import json
import os
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton
from torch import Tensor

from .._version import __version__
from .heuristics import ConvTile

_REPEATS = 20

# What this process has tuned or read, by file; those it could not write are here alone.
_known: dict[Path, ConvTile] = {}


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
    dtype = str(x.dtype).removeprefix("torch.")
    key = "-".join(map(str, (kernel, dtype, x.shape[-1], kernel_size, *sizes)))
    return tuned(_device_key(x.device), key, tile, launch)


def tuned(
    device_key: str, key: str, tile: ConvTile, launch: Callable[[ConvTile], object]
) -> ConvTile:
    """The tile known for `key` on a device, or the fastest candidate, which it makes known."""
    path = cache_path(device_key, key)
    known = _known.get(path) or _read(path, device_key, candidates(tile))
    if known is None:
        if torch.cuda.is_current_stream_capturing():
            return tile
        known = fastest(candidates(tile), launch, _measure)
        _write(path, device_key, known)
    _known[path] = known
    return known


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
    name = torch.cuda.get_device_name(device)
    return f"{name}-{driver}-triton{triton.__version__}-convnest{__version__}"


def cache_path(device_key: str, key: str) -> Path:
    """The JSON file of a key on a device."""
    root = os.environ.get("CONVNEST_CACHE_DIR") or Path.home() / ".cache" / "convnest_kernels"
    directory = re.sub(r"[^A-Za-z0-9.]+", "_", device_key)
    return Path(root) / f"triton-{directory}" / f"{key}.json"


def _read(path: Path, device_key: str, allowed: list[ConvTile]) -> ConvTile | None:
    """The tile in a file; None, with a warning where there is one that cannot be used."""
    try:
        entry = json.loads(path.read_text())
        tile, written_for = ConvTile(**entry["tile"]), entry["device"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        _refuse(path, f"it cannot be read ({type(error).__name__}: {error})")
        return None
    if written_for != device_key:
        _refuse(path, f"it was written for {written_for}, this is {device_key}")
        return None
    if tile not in allowed:
        _refuse(path, f"its tile is none of today's candidates: {tile}")
        return None
    return tile


def _refuse(path: Path, why: str) -> None:
    warnings.warn(f"CONVNEST_AUTOTUNE tunes again: {path} is of no use, {why}", stacklevel=2)


def _write(path: Path, device_key: str, tile: ConvTile) -> None:
    """Replace the file whole, so that a reader never sees half of one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump({"device": device_key, "tile": asdict(tile)}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(
            f"CONVNEST_AUTOTUNE could not keep its result: {error}; CONVNEST_CACHE_DIR names "
            "another directory",
            stacklevel=2,
        )
