"""The weights of nested_block as its forward reads them, kept as long as they do not change.

A call without a backward that meets the same weights, unchanged, a second time packs them into
memory that its later calls read. What is kept goes with the first weight's tensor, and is as large
as the weights: once for each dtype of the activations that it meets.

A change is seen by the weights' identity, address and version counter, which every in-place
operation of torch moves (optimizers, load_state_dict). Writing through `.data` or NumPy does not
move it: there a hash of 64 words of each weight tells, which sees what an optimizer or an average
of weights changes, but may miss a change of a few elements.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._host import _C, DTYPE_CODES, address, parameter


class _Entry(NamedTuple):
    weights: tuple[weakref.ref[Tensor], ...]
    state: tuple[Any, ...]  # what tells that they changed
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
    entry = _entries.get(key)
    same = entry is not None and all(
        ref() is weight for ref, weight in zip(entry.weights, weights, strict=True)
    )
    if entry is not None and same and entry.state == state:
        if entry.memory is not None:
            return entry.memory
        memory = _pack(weights, x)
    else:
        memory = None
    with _lock:
        first = weakref.ref(weights[0], lambda _: _entries.pop(key, None))
        _entries[key] = _Entry((first, *map(weakref.ref, weights[1:])), state, memory)
    return memory


def _state(weights: Sequence[Tensor]) -> tuple[Any, ...]:
    addresses = tuple(weight.data_ptr() for weight in weights)
    return (
        _C.cpu.isa(),
        addresses,
        tuple(weight._version for weight in weights),
        tuple(weight.stride() for weight in weights),
        _C.cpu.sample(addresses, [_extent(weight) for weight in weights]),
    )


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
    memory = torch.empty(_C.cpu.nested_block_pack(*sizes, 0), dtype=torch.uint8)
    _C.cpu.nested_block_pack(*sizes, memory.data_ptr())
    return memory
