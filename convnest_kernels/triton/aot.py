"""Compile the kernels ahead of time, for GPUs that need not be there, and report what came out.

    with record("90") as launches:          # host functions run, nothing is launched
        nested_conv.forward(h.to("meta"), ...)
    for launch in launches:
        print(report(launch, "90"))

`record` takes the launches from the host functions themselves, so that what is compiled here is
what runs: the same signature, specialisation, constexprs, warps and stages. Needs Triton, no GPU
and no CUDA toolkit (the wheel brings its disassembler). `bench/triton_report.py` is the command
line over it.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import importlib
import io
import re
import subprocess
import tempfile
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from . import _launch, heuristics
from .aot_table import Row

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)"
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# What an SM (a CU) offers: registers, threads, and the register allocation's granularity a warp.
_REGISTERS, _THREADS = 65536, {"80": 2048, "90": 2048, "100": 2048, "120": 1536, "gfx942": 2048}


@dataclass(frozen=True)
class Launch:
    """One kernel as a host function launches it: everything that decides the machine code."""

    kernel: str  # "module:function"
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # arguments known to be multiples of 16
    options: tuple[tuple[str, int], ...]

    @property
    def dtype(self) -> str:
        """The activation's type: that of the first pointer."""
        return next(t for _, t in self.signature if t.startswith("*")).lstrip("*")

    @property
    def digest(self) -> str:
        """What identifies it in the table of `aot_table`."""
        return _digest(repr(self))


@contextlib.contextmanager
def record(arch: str) -> Iterator[list[Launch]]:
    """Collect the launches of the host functions called inside, as if on a GPU of `arch`."""
    launches: dict[Launch, None] = {}
    run, architecture = JITFunction.run, _launch.architecture

    def recorder(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.setdefault(_describe(kernel, args, kwargs))

    collected: list[Launch] = []
    JITFunction.run, _launch.architecture = recorder, lambda x: arch
    try:
        yield collected
    finally:
        JITFunction.run, _launch.architecture = run, architecture
        collected.extend(launches)


def _describe(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, args, strict=False))
    values |= {name: value for name, value in kwargs.items() if name in names}
    options = tuple((k, v) for k, v in kwargs.items() if k not in names)
    signature, constexprs, divisible = [], [], []
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        kind = "constexpr"
        is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or is_one:
            constexprs.append((parameter.name, value))
        elif isinstance(value, Tensor):
            kind = f"*{_TYPES[value.dtype]}"
            divisible.append(i)
        elif isinstance(value, float):
            kind = "fp32"
        else:
            kind = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(i)
        signature.append((parameter.name, kind))
    name = f"{kernel.fn.__module__.rsplit('.', 1)[-1]}:{kernel.fn.__name__}"
    return Launch(name, tuple(signature), tuple(constexprs), tuple(divisible), options)


def _target(arch: str) -> GPUTarget:
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch), 32)


def _function(kernel: str) -> Any:
    module, name = kernel.split(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)


def compile_launch(launch: Launch, arch: str) -> Any:
    """Compile with Triton; returns its CompiledKernel (`.asm`, `.metadata`)."""
    position = {name: i for i, (name, _) in enumerate(launch.signature)}
    source = ASTSource(
        _function(launch.kernel),
        dict(launch.signature),
        {(position[name],): value for name, value in launch.constexprs},
        {(i,): [["tt.divisibility", 16]] for i in launch.divisible},
    )
    return triton.compile(source, target=_target(arch), options=dict(launch.options))


def report(launch: Launch, arch: str) -> Row:
    """Compile a launch for `arch` and read registers, spills, shared bytes and instructions."""
    compiled = compile_launch(launch, arch)
    num_warps = dict(launch.options)["num_warps"]
    shared = compiled.metadata.shared
    if arch.startswith("gfx"):
        registers, spills, mix = _read_amdgcn(compiled.asm["amdgcn"])
    else:
        registers, spills, mix = _read_cubin(compiled.asm["cubin"])
    integers = {name for name, kind in launch.signature if kind in ("i32", "i64")}
    tile = [
        name if value is True else f"{name}={value}"
        for name, value in launch.constexprs
        if value is not False
    ]
    return Row(
        arch=arch,
        kernel=launch.kernel.split(":")[1],
        dtype=launch.dtype,
        tile=" ".join(tile),
        options=" ".join(f"{name}={value}" for name, value in launch.options),
        aligned=" ".join(
            launch.signature[i][0] for i in launch.divisible if launch.signature[i][0] in integers
        ),
        registers=registers,
        spills=spills,
        shared=shared,
        occupancy=round(_occupancy(arch, registers, shared, num_warps), 2),
        instructions=sum(mix.values()),
        mix=" ".join(f"{name}:{count}" for name, count in mix.most_common(8)),
        launch=launch.digest,
        source=source_digest(launch.kernel),
        triton=triton.__version__,
    )


@functools.cache
def source_digest(kernel: str) -> str:
    """A digest of a kernel ("module:function") and all device functions below it.

    Of its code alone: comments, docstrings and line breaks make no difference.
    """
    found: dict[str, str] = {}
    waiting = [_function(kernel)]
    while waiting:
        function = waiting.pop()
        name = f"{function.fn.__module__}.{function.fn.__name__}"
        if name in found:
            continue
        found[name] = _code(function.src)
        names = function.fn.__globals__
        called = (names.get(word) for word in re.findall(r"\w+", found[name]))
        waiting += [value for value in called if isinstance(value, JITFunction)]
    return _digest(repr(sorted(found.items())))


def _code(source: str) -> str:
    skipped = (tokenize.COMMENT, tokenize.NL)
    layout = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    tokens: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        at_start = bool(tokens) and tokens[-1].type in layout
        is_docstring = at_start and token.type in (tokenize.STRING, tokenize.NEWLINE)
        if token.type not in skipped and not is_docstring:
            tokens.append(token)
    marks = {tokenize.NEWLINE: "\n", tokenize.INDENT: "{", tokenize.DEDENT: "}"}
    return " ".join(marks.get(token.type, token.string) for token in tokens)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _occupancy(arch: str, registers: int, shared: int, num_warps: int) -> float:
    """Resident threads an SM as a fraction, by registers and shared memory; first order."""
    if arch.startswith("gfx"):
        # 512 vector registers a lane and SIMD, in steps of 8; at most 8 waves on each of 4 SIMDs.
        waves = 4 * min(8, 512 // max(8, -(-registers // 8) * 8))
        blocks, threads, possible = waves // num_warps, num_warps * 64, 2048
    else:
        warp_registers = -(-registers // 8) * 8 * 32
        blocks = _REGISTERS // (warp_registers * num_warps)
        threads, possible = num_warps * 32, _THREADS[arch]
    if shared:
        blocks = min(blocks, heuristics.SHARED_BYTES[arch] // shared)
    return min(1.0, blocks * threads / possible)


def _read_cubin(cubin: bytes) -> tuple[int, int, collections.Counter[str]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        listing = _tool("nvdisasm", "-c", file.name)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    mix = collections.Counter(re.findall(_INSTRUCTION, listing, re.M))
    del mix["NOP"]
    return found["REG"], found["STACK"] + found["LOCAL"], mix


def disassemble(cubin: bytes) -> str:
    """The listing of nvdisasm."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _tool("nvdisasm", "-c", file.name)


def loop_mix(cubin: bytes) -> collections.Counter[str]:
    """The instructions of the largest innermost loop: for a convolution, one step down the rows."""
    listing = disassemble(cubin)
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.match(_INSTRUCTION, line):
            opcodes.append(found[1])
            target = re.search(r"\((\.L_x_\d+)\)", line)
            start = labels.get(target[1], len(opcodes)) if target else len(opcodes)
            if found[1] == "BRA" and start < len(opcodes) - 1:
                loops.append((start, len(opcodes)))

    def encloses(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a != b and a[0] <= b[0] and b[1] <= a[1]

    innermost = [a for a in loops if not any(encloses(a, b) for b in loops)]
    if not innermost:
        return collections.Counter()
    start, end = max(innermost, key=lambda loop: loop[1] - loop[0])
    return collections.Counter(opcode for opcode in opcodes[start:end] if opcode != "NOP")


def _tool(name: str, *arguments: str) -> str:
    run = subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def _read_amdgcn(text: str) -> tuple[int, int, collections.Counter[str]]:
    def metadata(key: str) -> int:
        match = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(match[1]) if match else 0

    mix = collections.Counter(re.findall(r"^\t([a-z]\w+)", text, re.M))
    del mix["s_nop"]
    # Scalar registers spill into lanes of vector registers; only scratch memory costs traffic.
    scratch = metadata("private_segment_fixed_size")
    return metadata("vgpr_count") + metadata("agpr_count"), scratch, mix
