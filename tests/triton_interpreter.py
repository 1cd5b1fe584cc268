"""Triton's interpreter made fit for tests: right about bfloat16, strict about memory, and counting.

Import this before anything imports triton: `enable()` asks for the interpreter where there is no
GPU, and repairs it. What it adds to the interpreter of Triton 3.6 and newer:

- casts from float32 to bfloat16 round to nearest even (stock: truncation), `tl.dot` on bfloat16
  multiplies numbers (stock: their bits), and any other bfloat16 arithmetic is an error;
- a load or store outside the tensors of its launch is an error (stock: silence, or a crash);
- so is a race: an element that two programs write, that one writes twice in one store, or that one
  program reads after another has written it;
- `traced()` counts the elements that every kernel loads and stores, tensor by tensor.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

# The compile tests run in a process of their own that must have the compiler.
compiles = os.environ.get("CONVNEST_TEST_COMPILE") == "1"
available = (
    importlib.util.find_spec("triton") is not None
    and not torch.cuda.is_available()
    and not compiles
)

if available:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter as stock


class KernelError(RuntimeError):
    """A kernel did what a GPU would get wrong in silence."""


@dataclass
class Traffic:
    """Elements of one tensor that a kernel moves, summed over its programs."""

    loads: int = 0  # every unmasked lane of every load
    fetched: int = 0  # distinct elements of each program: what is left if its reloads hit L1
    stores: int = 0


@dataclass
class KernelTrace:
    """One launch: its name and the traffic of its tensors, by argument name."""

    kernel: str
    traffic: dict[str, Traffic] = field(default_factory=dict)


@dataclass
class _Span:
    """A storage that a launch was given."""

    name: str
    start: int
    end: int
    writers: np.ndarray
    seen: set[int] = field(default_factory=set)


class _Memory:
    """Watches the loads and stores of the launch that is running."""

    def __init__(self) -> None:
        self.spans: list[_Span] = []
        self.traces: list[KernelTrace] | None = None
        self.program = 0

    def launch(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.spans.clear()
        known = set()
        for name, value in arguments.items():
            if not isinstance(value, torch.Tensor) or value.data_ptr() in known:
                continue
            known.add(value.data_ptr())
            storage = value.untyped_storage()
            start = storage.data_ptr()
            writers = np.zeros(storage.nbytes(), np.int32)
            self.spans.append(_Span(name, start, start + storage.nbytes(), writers))
        if self.traces is not None:
            self.traces.append(KernelTrace(kernel, {s.name: Traffic() for s in self.spans}))

    def access(self, builder: Any, pointers: Any, mask: Any, store: bool) -> None:
        x, y, z = builder.grid_idx
        _, height, depth = builder.grid_dim
        program = 1 + (x * height + y) * depth + z
        if program != self.program:
            self.program = program
            for span in self.spans:
                span.seen.clear()
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        addresses = addresses.astype(np.int64)
        if not addresses.size:
            return
        low, high = int(addresses.min()), int(addresses.max()) + itemsize
        for span in self.spans:
            if span.start <= low and high <= span.end:
                self._check(span, addresses - span.start, program, store)
                return
        action = "store" if store else "load"
        names = ", ".join(f"{s.name} [{s.start:#x}, {s.end:#x})" for s in self.spans)
        raise KernelError(f"{action} outside of every tensor: {low:#x} to {high:#x}; {names}")

    def _check(self, span: _Span, offsets: np.ndarray, program: int, store: bool) -> None:
        writers = span.writers[offsets]
        if ((writers != 0) & (writers != program)).any():
            action = "writes" if store else "reads"
            raise KernelError(f"race: program {program} {action} what another wrote, {span.name}")
        if store:
            if np.unique(offsets).size != offsets.size:
                raise KernelError(f"race: one store writes an element twice, {span.name}")
            span.writers[offsets] = program
        if self.traces is None:
            return
        traffic = self.traces[-1].traffic[span.name]
        if store:
            traffic.stores += offsets.size
        else:
            traffic.loads += offsets.size
            before = len(span.seen)
            span.seen.update(offsets.tolist())
            traffic.fetched += len(span.seen) - before


_memory = _Memory()


@contextmanager
def traced() -> Iterator[list[KernelTrace]]:
    """Collect the traffic of every kernel launched inside."""
    _memory.traces = []
    try:
        yield _memory.traces
    finally:
        _memory.traces = None


def enable() -> bool:
    """Repair the interpreter, once; returns whether kernels will run in it."""
    if available and not hasattr(stock, "_repaired_by_tests"):
        stock._repaired_by_tests = True
        _repair_bfloat16()
        _watch_memory()
    return available


def _to_bits(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _from_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, stock.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _repair_bfloat16() -> None:
    builder = stock.InterpreterBuilder
    stock_cast, stock_dot = builder.cast_impl, builder.create_dot

    def cast(self: Any, source: Any, target: Any) -> Any:
        to = target.scalar
        if _is_bfloat16(source) and to != tl.bfloat16:
            data = _from_bits(source.data).astype(stock._get_np_dtype(target))
            return stock.TensorHandle(data, to)
        if to == tl.bfloat16 and not _is_bfloat16(source):
            return stock.TensorHandle(_to_bits(source.data), to)
        return stock_cast(self, source, target)

    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        if not _is_bfloat16(a):
            return stock_dot(self, a, b, d, precision, imprecise)
        product = np.matmul(_from_bits(a.data), _from_bits(b.data))
        return stock.TensorHandle(product + d.data, d.dtype.scalar)

    def strict(name: str) -> None:
        original = getattr(builder, name)

        def checked(self: Any, *args: Any) -> Any:
            *handles, operation = args
            if operation is not np.where and any(map(_is_bfloat16, handles)):
                raise KernelError("bfloat16 arithmetic: convert to float32 after the load")
            return original(self, *args)

        setattr(builder, name, checked)

    builder.cast_impl, builder.create_dot = cast, dot
    for name in ("unary_op", "binary_op", "ternary_op"):
        strict(name)


def _watch_memory() -> None:
    builder, executor = stock.InterpreterBuilder, stock.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    convert = executor._init_args_hst

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        _memory.access(self, pointers, mask, store=False)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _memory.access(self, pointers, mask, store=True)
        return store(self, pointers, value, mask, *rest)

    def forbidden(self: Any, *_: Any) -> Any:
        raise KernelError("atomics make a result depend on the order of programs")

    def watched_launch(self: Any, args: Any, kwargs: Any) -> Any:
        converted, converted_kwargs = convert(self, args, kwargs)
        names = dict(zip(self.arg_names, converted, strict=False))
        _memory.launch(self.fn.__name__, names | converted_kwargs)
        return converted, converted_kwargs

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    builder.create_atomic_rmw = builder.create_atomic_cas = forbidden
    executor._init_args_hst = watched_launch


enable()
