"""Plots of a results folder: roofline, speed-up by stage, memory against batch (matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import report
from bench.cells import Cell
from bench.contenders import CONTENDERS, REFERENCE

COLOURS = {
    "ours": "#d1495b",
    "triton": "#e8a4ad",  # beside cuda
    "eager-nhwc": "#8d99ae",
    "eager-nchw": "#bcc4d1",
    "compile-nhwc": "#30638e",
    "compile-nchw": "#6a9fc9",
    "compile-max-autotune": "#003d5b",
    "onnxruntime": "#edae49",
    "openvino": "#5c946e",
}
Pairs = list[tuple[Cell, dict[str, Any]]]


def _colour(name: str) -> str:
    return COLOURS.get(name, COLOURS["ours"] if CONTENDERS[name].ours else "#666666")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.hashsalt": "convnest",
        }
    )
    return pyplot


def draw_all(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what the records allow; returns the files written."""
    figures: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
        "roofline.png": roofline,
        "speedup.png": speed_up,
        "memory.png": memory,
    }
    pyplot = _pyplot()
    written = []
    for name, draw in figures.items():
        figure = draw(pyplot, results)
        if figure is None:
            continue
        figure.savefig(folder / name, dpi=150, bbox_inches="tight", metadata={"Software": None})
        pyplot.close(figure)
        written.append(folder / name)
    return written


def _stage_pairs(results: dict[str, Any], **wanted: Any) -> Pairs:
    return [
        (cell, record)
        for cell, record in report.ordered(results)
        if cell.stage
        and cell.memory_format == "channels_last"
        and all(getattr(cell, k) == v for k, v in wanted.items())
    ]


def speed_up(pyplot: Any, results: dict[str, Any]) -> Any:
    """Bars of every contender over eager NHWC, by stage; a panel for each block setting."""
    groups: dict[tuple[Any, ...], Pairs] = {}
    for cell, record in _stage_pairs(results, subject="block"):
        if cell.allocator == "default" and cell.device == "cpu":
            continue
        key = cell.mode, cell.dtype, cell.batch
        if any("median" in found for found in record["contenders"].values()):
            groups.setdefault(key, []).append((cell, record))
    if not groups:
        return None
    columns = min(3, len(groups))
    lines = math.ceil(len(groups) / columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4.2 * columns, 2.9 * lines), squeeze=False, layout="constrained"
    )
    labels: dict[str, Any] = {}
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, ((mode, dtype, batch), pairs) in zip(axes.flat, groups.items(), strict=False):
        names = [
            name for name in CONTENDERS
            if name != REFERENCE and any(report.speed_up(r, name) for _, r in pairs)
        ]  # fmt: skip
        width = 0.8 / max(len(names), 1)
        for i, name in enumerate(names):
            ratios = [report.speed_up(record, name) or 0 for _, record in pairs]
            places = [n + (i - (len(names) - 1) / 2) * width for n in range(len(pairs))]
            bars = axis.bar(places, ratios, width * 0.95, color=_colour(name))
            label = f"ours ({name})" if CONTENDERS[name].ours else name
            labels.setdefault(label, bars)
            if CONTENDERS[name].ours:
                axis.bar_label(bars, fmt="%.1f", fontsize=7)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(pairs)), [f"{c.shape.height}²×{c.shape.dim}" for c, _ in pairs])
        axis.set_title(f"{mode}, {dtype}, batch {batch}", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("times as fast as eager NHWC")
    figure.legend(
        labels.values(), labels.keys(), loc="outside lower center", ncols=len(labels), frameon=False
    )
    figure.suptitle(f"One block of {_variant(groups)}, by stage (map × channels)")
    return figure


def _variant(groups: dict[Any, Pairs]) -> str:
    return next(iter(groups.values()))[0][0].variant


def roofline(pyplot: Any, results: dict[str, Any]) -> Any:
    """FLOP/s against FLOPs a byte that must move, under the measured limits."""
    limits = results["limits"]
    pairs = [
        (cell, record)
        for cell, record in _stage_pairs(results, mode="infer", dtype="float32")
        if (record.get("cost") and record["cost"]["flops"] and cell.allocator != "default")
        or (record.get("cost") and record["cost"]["flops"] and cell.device == "cuda")
    ]  # fmt: skip
    if not pairs or limits is None:
        return None
    figure, axis = pyplot.subplots(figsize=(7, 4.6), layout="constrained")
    if "copy" in limits:
        peak, levels = limits["float32"], [("copy", limits["copy"])]
    else:
        peak = limits["float32_flops"]
        sizes = [report.size_name(size) for size, _ in limits["bandwidths"]]
        levels = list(zip(sizes, (rate for _, rate in limits["bandwidths"]), strict=True))
    intensities = [0.25 * 2 ** (i / 8) for i in range(100)]
    for i, (name, rate) in enumerate(levels):
        roof = [min(peak, rate * x) / 1e9 for x in intensities]
        shade = str(0.75 - 0.22 * i)
        axis.plot(intensities, roof, color=shade, linewidth=1, label=f"copy within {name}")
    axis.axhline(peak / 1e9, color="black", linewidth=1)
    axis.annotate(
        f"float32: {peak / 1e9:.0f} GFLOP/s", (intensities[0], peak / 1e9), va="bottom", fontsize=8
    )
    marks = {"block": "o", "nested_conv": "s", "dwconv_gelu_layernorm": "^"}
    for cell, record in pairs:
        peer = report.best_peer(record)
        x = record["cost"]["flops"] / record["cost"]["bytes"]
        for name in (report.ours(record), peer):
            if name is None:
                continue
            y = record["cost"]["flops"] / record["contenders"][name]["median"] / 1e9
            axis.plot(
                x, y, marks.get(cell.subject, "x"), color=_colour(name), markersize=5, alpha=0.85
            )
    for subject, mark in marks.items():
        if any(cell.subject == subject for cell, _ in pairs):
            axis.plot([], [], mark, color="black", markersize=5, label=subject, alpha=0.85)
    axis.plot([], [], "s", color=COLOURS["ours"], label="red: ours")
    axis.plot([], [], "s", color="#666666", label="other colours: the best peer")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOPs for each byte that must move (inputs and outputs once)")
    axis.set_ylabel("GFLOP/s (GELU and LayerNorm not counted)")
    machine = results["machine"] or {}
    axis.set_title(f"{machine.get('gpu') or machine.get('processor')}, inference, float32")
    axis.legend(fontsize=7, frameon=False)
    return figure


def memory(pyplot: Any, results: dict[str, Any]) -> Any:
    """Bytes kept for backward by a block's training step against batch, at each stage."""
    pairs = _stage_pairs(results, subject="block", mode="train", dtype="float32")
    if not pairs:
        pairs = _stage_pairs(results, subject="block", mode="train")
    curves: dict[tuple[int, str], dict[int, float]] = {}
    for cell, record in pairs:
        for name, found in record["contenders"].items():
            if found.get("kept_for_backward") is not None:
                curve = curves.setdefault((cell.stage, name), {})
                curve[cell.batch] = found["kept_for_backward"] / 1e6
    if not curves:
        return None
    numbers = sorted({stage for stage, _ in curves})
    figure, axes = pyplot.subplots(
        1, len(numbers), figsize=(3.1 * len(numbers), 3), squeeze=False, layout="constrained"
    )
    labels: dict[str, Any] = {}
    for axis, number in zip(axes.flat, numbers, strict=True):
        for (stage, name), curve in curves.items():
            if stage != number:
                continue
            # Both layouts of eager keep the same: a ring shows around the point on top.
            size = 9 if name == REFERENCE else 5
            (line,) = axis.plot(
                sorted(curve), [curve[b] for b in sorted(curve)], "o-", color=_colour(name),
                markersize=size,
            )  # fmt: skip
            labels.setdefault(f"ours ({name})" if CONTENDERS[name].ours else name, line)
        axis.set_title(f"stage {number}", fontsize=9)
        axis.set_xlabel("batch")
        axis.set_xticks(
            sorted({b for key, curve in curves.items() if key[0] == number for b in curve})
        )
        axis.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("MB kept for backward")
    figure.legend(
        labels.values(), labels.keys(), loc="outside lower center", ncols=len(labels), frameon=False
    )
    return figure
