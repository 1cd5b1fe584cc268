"""`explain`: which backend a call of a public operator gets, and why not the others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from . import ops
from .backends import Call, Explanation, explain_call

# What checks a public function's arguments and describes the call to the backends.
_DESCRIBE: dict[Callable[..., Any], Callable[..., Call]] = {
    function: sys.modules[function.__module__].describe
    for function in (getattr(ops, name) for name in ops.__all__)
}


def explain(
    operator: Callable[..., Any], *args: Any, backend: str | None = None, **kwargs: Any
) -> Explanation:
    """Say which backend `operator(*args, **kwargs)` would run on, and why not on the others.

    `operator` is a function of `convnest_kernels.ops`; its arguments are checked, nothing is run.
    Of `nested_block` it explains the wide half, `nested_conv`.

    >>> print(explain(ops.nested_conv, h, conv_weight, conv_bias, ln_weight, ln_bias))
    """
    describe = _DESCRIBE.get(operator)
    if describe is None:
        names = ", ".join(function.__name__ for function in _DESCRIBE)
        raise TypeError(f"operator must be a function of convnest_kernels.ops ({names})")
    return explain_call(describe(*args, **kwargs), backend)
