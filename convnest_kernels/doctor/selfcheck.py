"""Every backend present against float64: each operator and dtype, forward and all gradients.

Truth is the eager formula in float64, on the very values that the inputs hold. With e the largest
error of eager in the same dtype, s the largest magnitude of the truth (at least 1, the inputs'),
ε the machine epsilon of the result, a that of the accumulator and R the rows a gradient sums over,

    |result - truth| <= 2·e + s·(ε + 16·a·√R)

where 16 stands for the roundings along one element's way through an operator.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from convnest_kernels import _extension, backends, ops
from convnest_kernels.doctor import dispatch
from convnest_kernels.doctor.text import short, table
from convnest_kernels.reference.common import accumulate_dtype

# Sizes that are no multiple of any vector or tile.
_N, _H, _W, _C, _K = 2, 9, 11, 50, 7
_ROUNDINGS = 16


@dataclass(frozen=True)
class Case:
    """An operator with its options, and the shapes of its arguments; activations come first."""

    operator: str
    arguments: dict[str, tuple[int, ...]]
    activations: int
    options: dict[str, Any] = field(default_factory=dict)

    def draw(self, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
        """Arguments and dy, drawn from a fixed seed; parameters are in the accumulate dtype."""
        seed = zlib.crc32(repr((self.operator, self.options)).encode())
        generator = torch.Generator().manual_seed(seed)
        tensors = []
        for i, shape in enumerate([*self.arguments.values(), (_N, _H, _W, _C)]):
            is_activation = i < self.activations or i == len(self.arguments)
            kind = dtype if is_activation else accumulate_dtype(dtype)
            scale = 1.0 if len(shape) != 4 or is_activation else 1 / _K
            drawn = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
            tensors.append(drawn.to(device=device, dtype=kind))
        return tensors[:-1], tensors[-1]


_MAP = (_N, _H, _W, _C)
_CONV = {"conv_weight": (_C, 1, _K, _K), "conv_bias": (_C,)}
_NORM = {"ln_weight": (_C,), "ln_bias": (_C,)}
_DWCONV = {"x": _MAP, **_CONV, **_NORM}

CASES = (
    Case("nested_conv", {"h": _MAP, **_CONV, **_NORM}, 1),
    Case("nested_conv", {"h": _MAP, **_CONV, **_NORM}, 1, {"shortcut": False}),
    Case("dwconv_gelu_layernorm", _DWCONV, 1),
    Case("dwconv_gelu_layernorm", _DWCONV, 1, {"norm_first": True}),
    Case("dwconv_gelu_layernorm", _DWCONV, 1, {"activation": "none"}),
    Case("gelu_layernorm", {"x": _MAP, **_NORM}, 1),
    Case("gelu_layernorm", {"x": _MAP, **_NORM}, 1, {"norm_first": True}),
    Case("layernorm_residual", {"t": _MAP, "x": _MAP, **_NORM, "scale": (_C,)}, 2),
)


def collect() -> list[dict[str, Any]]:
    """One entry per backend, instruction set, case and dtype: its worst result and its bound."""
    truths: dict[Any, Any] = {}
    found = []
    for explanation in dispatch.explain_all():
        call = explanation.call
        for backend, reasons in explanation.reasons.items():
            if reasons or backend == "eager":
                continue
            for isa in _isas(backend):
                for case in (case for case in CASES if case.operator == call.operator):
                    key = case.operator, repr(case.options), call.dtype, call.device
                    if key not in truths:
                        truths[key] = _truth(case, call.dtype, call.device)
                    with _active(isa):
                        entry = _check(case, backend, call.dtype, call.device, *truths[key])
                    found.append({"backend": backend, "isa": isa, **entry})
    return found


def _isas(backend: str) -> Sequence[str | None]:
    return _extension.module.cpu.isas() if backend == "cpu" and _extension.module else [None]


@contextmanager
def _active(isa: str | None) -> Iterator[None]:
    """Run the CPU kernels of one instruction set."""
    if isa is None:
        yield
        return
    core: Any = _extension.module
    before = core.cpu.isa()
    core.cpu.set_isa(isa)
    try:
        yield
    finally:
        core.cpu.set_isa(before)


def _truth(
    case: Case, dtype: torch.dtype, device: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The results in float64, and what each may be off by."""
    arguments, dy = case.draw(dtype, device)
    eager = _run(case, arguments, dy, "eager")
    truth = _run(case, [x.double() for x in arguments], dy.double(), "eager")
    bounds = {}
    for i, (name, result) in enumerate(eager.items()):
        rows = 1 if i <= case.activations else _N * _H * _W
        error = (result.double() - truth[name]).abs().max().item()
        scale = max(1.0, truth[name].abs().max().item())
        accumulated = torch.finfo(accumulate_dtype(result.dtype)).eps * math.sqrt(rows)
        floor = torch.finfo(result.dtype).eps + _ROUNDINGS * accumulated
        bounds[name] = 2 * error + scale * floor
    return truth, bounds


def _run(case: Case, arguments: list[Tensor], dy: Tensor, backend: str) -> dict[str, Tensor]:
    """The operator's output and the gradient of every argument."""
    function: Callable[..., Tensor] = getattr(ops, case.operator)
    inputs = [x.detach().requires_grad_() for x in arguments]
    y = function(*inputs, **case.options, backend=backend)
    grads = torch.autograd.grad(y, inputs, dy)
    names = ["output", *(f"d{name}" for name in case.arguments)]
    return dict(zip(names, [y.detach(), *grads], strict=True))


def _check(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    device: str,
    truth: dict[str, Tensor],
    bounds: dict[str, float],
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "device": device,
        "operator": case.operator,
        "options": case.options,
        "dtype": short(dtype),
        "ok": False,
        "quantity": None,
        "error": None,
        "bound": None,
        "message": None,
    }
    try:
        results = _run(case, *case.draw(dtype, device), backend)
    except (RuntimeError, ValueError, TypeError) as error:  # a kernel that fails is a finding
        return {**entry, "message": f"{type(error).__name__}: {error}"}
    errors = {name: _error(results[name], truth[name]) for name in truth}
    worst = max(errors, key=lambda name: errors[name] / bounds[name])
    ok = errors[worst] <= bounds[worst]
    entry |= {"ok": ok, "quantity": worst, "error": errors[worst], "bound": bounds[worst]}
    if errors[worst] == math.inf:  # which JSON does not have
        entry |= {"error": None, "message": f"{worst} has non-finite elements"}
    return entry


def _error(result: Tensor, truth: Tensor) -> float:
    if not result.isfinite().all():
        return math.inf
    return (result.double() - truth).abs().max().item()


def show(found: list[dict[str, Any]]) -> list[str]:
    """A table of the largest error in units of its bound, then every failure."""
    missing = _unchecked(found)
    if not found:
        return ["no backend but eager, the reference, is present: nothing to check", *missing]
    dtypes = [short(dtype) for dtype in dispatch.DTYPES]
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for entry in found:
        name = entry["backend"] + (f" {entry['isa']}" if entry["isa"] else "")
        dtypes_of = groups.setdefault((name, entry["operator"]), {})
        dtypes_of.setdefault(entry["dtype"], []).append(entry)
    rows = [
        [name, operator, *(_cell(by_dtype.get(dtype, [])) for dtype in dtypes)]
        for (name, operator), by_dtype in sorted(groups.items(), key=lambda item: item[0][0])
    ]
    lines = ["largest error of output and gradients, as a part of what is allowed (1.00):"]
    lines += table([["backend", "operator", *dtypes], *rows])
    lines += missing
    return lines + [f"FAILED: {_describe(entry)}" for entry in found if not entry["ok"]]


def _unchecked(found: list[dict[str, Any]]) -> list[str]:
    """A word on the backends that did not run, so that nobody takes them for checked."""
    checked = {entry["backend"] for entry in found}
    names = [name for name in backends.BACKENDS if name not in checked | {"eager"}]
    if not names:
        return []
    why = "see above" if torch.cuda.is_available() else "there is no GPU here; see above"
    return [f"NOT CHECKED: {', '.join(names)} ({why})"]


def _cell(entries: list[dict[str, Any]]) -> str:
    if not entries:
        return "-"
    if any(not entry["ok"] for entry in entries):
        return "FAILED"
    return f"{max(entry['error'] / entry['bound'] for entry in entries):.2f}"


def _describe(entry: dict[str, Any]) -> str:
    isa = f" ({entry['isa']})" if entry["isa"] else ""
    options = "".join(f", {name}={value!r}" for name, value in entry["options"].items())
    what = f"{entry['backend']}{isa} {entry['operator']}{options}, {entry['dtype']}"
    if entry["message"]:
        return f"{what}: {entry['message']}"
    return (
        f"{what}: {entry['quantity']} is off by {entry['error']:.3g}, allowed {entry['bound']:.3g}"
    )
