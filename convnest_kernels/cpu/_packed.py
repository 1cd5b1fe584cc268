"""The weights of nested_block as its forward reads them, kept as long as they do not change.

A call without a backward that meets the same weights, unchanged, a second time packs them into
memory that its later calls read. What is kept goes with the first weight's tensor, and is as large
as the weights: once for each dtype of the activations that it meets.

A change is seen by the weights' identity, address and version counter, which every in-place
operation of torch moves (optimizers, load_state_dict). Writing through `.data` or NumPy does not
move it: there a hash of the weights tells. From 512 pixels a call on it is of every word, at most
2% of the work, and sees every change of one word. Below, it is of 64 words of each weight, which
sees what an optimizer or an average of weights changes, but may miss a change of a few elements:
after such a write to a block that runs on fewer pixels (a single image at 14x14 or 7x7), move the
weight's version, as `weight.add_(0)` under no_grad does.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._host import _C, DTYPE_CODES, address, parameter

# Reading the weights takes as long as the block's work on some 10 pixels (measured on Zen 4:
# 0.78 ms for the 15 MB of 384 channels, 19 GB/s, where 49 pixels take 4 ms).
_PIXELS_WORTH_A_WHOLE_HASH = 512

# Weights are streamed: in 4 KiB pages, stage 4 at batch 1 took 3 to 5% more (Zen 4).
_HUGE_PAGE = 2 << 20  # bytes


class _Entry(NamedTuple):
    weights: tuple[weakref.ref[Tensor], ...]
    state: tuple[Any, ...]  # what tells that they changed
    hashes: dict[bool, int]  # of some words (False) and of all (True), as far as they were wanted
    memory: Tensor | None  # None: seen once


_entries: dict[tuple[int, torch.dtype], _Entry] = {}
_lock = threading.Lock()


def packed_weights(weights: Sequence[Tensor], x: Tensor) -> Tensor | None:
    """The packed weights for activations like x; None where this call shall pack them itself.

    `weights` are fc1_weight, conv_weight and fc2_weight.
    """
    if any(weight.is_inference() for weight in weights):
        return None  # they have no version counter
    key = (id(weights[0]), x.dtype)
    state = _state(weights)
    whole = x.numel() // x.shape[-1] >= _PIXELS_WORTH_A_WHOLE_HASH
    entry = _entries.get(key)
    memory: Tensor | None = None
    if entry is not None and _same(entry, weights, state):
        if entry.memory is None and entry.hashes[False] == _hash(weights, False):
            memory = _pack(weights, x)
        elif entry.memory is not None and entry.hashes[whole] == _hash(weights, whole):
            return entry.memory
    # Whatever the size of this call, a larger one may find what is kept.
    kinds = (False,) if memory is None else (False, True)
    hashes = {kind: _hash(weights, kind) for kind in kinds}
    with _lock:
        first = weakref.ref(weights[0], lambda _: _entries.pop(key, None))
        _entries[key] = _Entry((first, *map(weakref.ref, weights[1:])), state, hashes, memory)
    return memory


def _same(entry: _Entry, weights: Sequence[Tensor], state: tuple[Any, ...]) -> bool:
    them = zip(entry.weights, weights, strict=True)
    return entry.state == state and all(ref() is weight for ref, weight in them)


def _state(weights: Sequence[Tensor]) -> tuple[Any, ...]:
    return (
        _C.cpu.isa(),
        *((weight.data_ptr(), weight._version, weight.stride()) for weight in weights),
    )


def _hash(weights: Sequence[Tensor], whole: bool) -> int:
    """Of some words of each weight, or of all."""
    addresses = [weight.data_ptr() for weight in weights]
    found: int = _C.cpu.hash_words(addresses, [_extent(weight) for weight in weights], whole)
    return found


def _extent(x: Tensor) -> int:
    """The bytes from the first element of x to its last one, gaps included."""
    if x.is_contiguous():
        return x.nbytes
    elements = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return (elements + 1) * x.element_size()


def _pack(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    wide, narrow = weights[0].shape
    held = [parameter(weight, x) for weight in weights]
    sizes = (*map(address, held), narrow, wide, weights[1].shape[2], DTYPE_CODES[x.dtype])
    memory = _whole_pages(_C.cpu.nested_block_pack(*sizes, 0))
    _C.cpu.nested_block_pack(*sizes, memory.data_ptr())
    return memory


def _whole_pages(size: int) -> Tensor:
    """Uninitialised bytes that begin with a huge page, which the core then asks for."""
    if size < _HUGE_PAGE:
        return torch.empty(size, dtype=torch.uint8)
    memory = torch.empty(size + _HUGE_PAGE, dtype=torch.uint8)  # what is left out is never touched
    return memory[-memory.data_ptr() % _HUGE_PAGE :][:size]
