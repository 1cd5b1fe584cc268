"""nested_block on the native CPU kernels (csrc/nested_block_cpu.cpp, nested_block_bwd_cpu.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._host import (
    _C,
    DTYPE_CODES,
    address,
    new_gradient,
    new_output,
    parameter,
)
from ._packed import packed_weights

# Of the parameters, in the operator's order: the weights that are packed, and what backward does
# not read.
_WEIGHTS = (0, 4, 6)
_FC2_BIAS, _POST_BIAS = 7, 9
_OUTPUTS = 8


def forward(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    eps: float,
    shortcut: bool,
    keep: bool,
) -> None:
    """Fill y, h, u, mean, rstd, t, post_mean and post_rstd, those that are there and not empty."""
    # In training the weights change from call to call.
    weights = [p for i, p in enumerate(parameters) if i in _WEIGHTS and p is not None]
    packed = None if keep else packed_weights(weights, x)
    held = [
        None if packed is not None and i in _WEIGHTS else parameter(p, x)
        for i, p in enumerate(parameters)
    ]
    _C.cpu.nested_block_forward(
        [address(x), *map(address, held), address(packed)],
        [*map(address, outputs), *[0] * (_OUTPUTS - len(outputs))],
        *_sizes(x, parameters),
        eps,
        shortcut,
        DTYPE_CODES[x.dtype],
    )


def backward(
    dy: Tensor, x: Tensor, kept: Sequence[Tensor], parameters: Sequence[Tensor | None],
    eps: float, shortcut: bool, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    read = [p for i, p in enumerate(parameters) if i not in (_FC2_BIAS, _POST_BIAS)]
    held = [parameter(p, x) for p in read]
    grads = (
        new_output(x, needs[0]),
        *(
            new_gradient(x, () if p is None else tuple(p.shape), need and p is not None)
            for p, need in zip(parameters, needs[1:], strict=True)
        ),
    )
    _C.cpu.nested_block_backward(
        list(map(address, (dy, x, *kept, *held))),
        list(map(address, grads)),
        *_sizes(x, parameters),
        eps,
        shortcut,
        DTYPE_CODES[x.dtype],
    )
    return grads


def _sizes(x: Tensor, parameters: Sequence[Tensor | None]) -> tuple[int, ...]:
    """N, H, W, C, D and K."""
    fc1_weight, conv_weight = parameters[0], parameters[4]
    assert fc1_weight is not None
    assert conv_weight is not None
    return (*x.shape, fc1_weight.shape[0], conv_weight.shape[2])
