"""Checks of the arguments of `NestedBlock`: errors name argument, expectation and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

DESIGNS = ("vanilla", "pre_activation", "post_norm", "convnest")
NORMS = ("layer", "batch")
RECOMPUTE = ("none", "conv", "all")


def choice(name: str, value: object, expected: Sequence[str]) -> str:
    """Return `value` if it is one of the expected names."""
    if not isinstance(value, str) or value not in expected:
        names = ", ".join(repr(each) for each in expected)
        raise ValueError(f"{name} must be one of {names}, got {value!r}")
    return value


def positive_int(name: str, value: object) -> int:
    """Return `value` if it is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def number(name: str, value: object) -> float:
    """Return `value` as a float if it is a finite real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def probability(name: str, value: object) -> float:
    """Return `value` if it lies in [0, 1)."""
    p = number(name, value)
    if not 0 <= p < 1:
        raise ValueError(f"{name} must be in [0, 1), got {p}")
    return p


def positive(name: str, value: object) -> float:
    """Return `value` as a float if it is a finite number above 0."""
    x = number(name, value)
    if x <= 0:
        raise ValueError(f"{name} must be above 0, got {x}")
    return x


def odd_kernel_size(value: object) -> int:
    """Return `value` if it is an odd int: an even kernel cannot keep the size of the map."""
    size = positive_int("kernel_size", value)
    if size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {size}")
    return size


def wide_channels(dim: int, expansion: object) -> int:
    """Return D = expansion · dim, which must be a whole number of channels."""
    ratio = number("expansion", expansion)
    wide = round(dim * ratio)
    if wide < 1 or not math.isclose(dim * ratio, wide, rel_tol=1e-9):
        raise ValueError(
            f"expansion must give a whole number of wide channels, at least 1, "
            f"got {expansion} x {dim} = {dim * ratio:g}"
        )
    return wide


def norm_pair(value: object) -> tuple[str, str]:
    """Return (first, second) if `value` is a pair of norm names."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"norm must be a pair like ('layer', 'batch'), got {value!r}")
    return choice("norm[0]", value[0], NORMS), choice("norm[1]", value[1], NORMS)


def inner_shortcut(value: object, design: str) -> bool:
    """Return whether the block has the inner shortcut, which only convnest can do without."""
    if not isinstance(value, bool):
        raise TypeError(f"shortcut must be a bool, got {value!r}")
    if not value and design != "convnest":
        raise ValueError(
            f"shortcut=False needs design='convnest': {design!r} has no inner shortcut to leave out"
        )
    return value and design == "convnest"
