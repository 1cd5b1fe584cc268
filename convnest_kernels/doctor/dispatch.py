"""Which backend runs what here, in the dispatch's own words."""

from __future__ import annotations

from typing import Any

import torch

from convnest_kernels.backends import BACKENDS, Call, Explanation, explain_call, requested
from convnest_kernels.doctor.text import short, table

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Every operator, with the kernel size it is asked about.
OPERATORS = {
    "nested_conv": 7,
    "dwconv_gelu_layernorm": 7,
    "gelu_layernorm": None,
    "layernorm_residual": None,
}

# A batch of 8 in stage 3 of ConvNeSt-T, at width D = 12 · 192.
_SHAPE = (8, 14, 14, 2304)


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def explain_all() -> list[Explanation]:
    """The dispatch's explanation for every device, operator and dtype."""
    try:
        backend = requested(None)
    except ValueError:  # a wrong CONVNEST_BACKEND, which `environment.versions` reports
        backend = "auto"
    return [
        explain_call(Call(operator, device, dtype, _SHAPE[-1], kernel_size, _SHAPE), backend)
        for device in devices()
        for operator, kernel_size in OPERATORS.items()
        for dtype in DTYPES
    ]


def collect() -> list[dict[str, Any]]:
    """One entry per device, operator and dtype: the backend used, the reasons against the rest.

    `auto`: of those that can run it, why "auto" passes them over.
    """
    return [
        {
            "device": explanation.call.device,
            "operator": explanation.call.operator,
            "dtype": short(explanation.call.dtype),
            "backend": explanation.backend,
            "reasons": explanation.reasons,
            "auto": explanation.auto,
        }
        for explanation in explain_all()
    ]


def show(found: list[dict[str, Any]]) -> list[str]:
    lines = []
    for device in dict.fromkeys(entry["device"] for entry in found):
        here = [entry for entry in found if entry["device"] == device]
        used = {(entry["operator"], entry["dtype"]): entry["backend"] or "none" for entry in here}
        dtypes = [short(dtype) for dtype in DTYPES]
        rows = [[operator, *(used[operator, dtype] for dtype in dtypes)] for operator in OPERATORS]
        lines += table([[f"on {device}", *dtypes], *rows])
        lines += _show_reasons(here)
    return lines


def _show_reasons(here: list[dict[str, Any]]) -> list[str]:
    """Each distinct reason once, with what it holds for where that is not everything."""
    lines = []
    for name in BACKENDS:
        for kind, label in (("reasons", "not"), ("auto", "auto passes over")):
            holds_for: dict[str, list[str]] = {}
            for entry in here:
                for reason in entry[kind][name]:
                    holds_for.setdefault(reason, []).append(f"{entry['operator']} {entry['dtype']}")
            for reason, calls in holds_for.items():
                where = "" if len(calls) == len(here) else f" [{', '.join(calls)}]"
                lines.append(f"  {label} {name}: {reason}{where}")
    return lines
