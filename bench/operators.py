"""What the four operator stems share: work over NHWC activations from the shared case table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench.cases import Case, make_inputs, stage_cases
from bench.cells import Cell
from bench.limits import taps_inside
from bench.work import Cost, Formula, Work


def build(
    cell: Cell,
    nchw: Callable[..., Tensor],
    *,
    gelus: int,
    conv: bool,
    passes: tuple[int, int],
    activations: int = 1,
    case: Case | None = None,
) -> Work:
    """Work of an operator; `passes` counts the activations moved at least in each mode."""
    if case is None:
        case = stage_cases(cell.variant, cell.batch, cell.subject, cell.image_size)[cell.stage - 1]
    inputs = make_inputs(case, cell.torch_dtype, device=cell.device, requires_grad=False)
    n, height, width, channels = case.shape
    elements = n * height * width * channels
    k = case.kernel_size
    taps = taps_inside(height, k) * taps_inside(width, k) if conv else 0
    cost = Cost(
        linear_flops=0,
        conv_flops=2 * n * channels * taps,
        gelus=gelus * elements,
        bytes_infer=passes[0] * elements * inputs.dy.element_size(),
        bytes_train=passes[1] * elements * inputs.dy.element_size(),
    )

    def form(function: Callable[..., Tensor], nhwc: bool = True, **options: Any) -> Formula:
        return Formula(function, inputs, activations, nhwc, **options)

    tensors = list(inputs.tensors.values())[:activations]
    return Work(
        cell,
        {"nhwc": form(case.formula), "nchw": form(nchw, nhwc=False)},
        tuple(x.permute(0, 3, 1, 2) for x in tensors if x is not None),
        inputs.dy.permute(0, 3, 1, 2),
        cost,
        make_ours=lambda backend: form(case.function, backend=backend),
        baselines={},
    )
