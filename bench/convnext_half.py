"""convnext_half: LN(DW(x)), the first half of a ConvNeXt block, at twice ConvNeSt's C.

It is `dwconv_gelu_layernorm` without its activation; ConvNeXt-T has twice ConvNeSt-T's channels.
"""

from bench import nchw, operators
from bench.cases import Case
from bench.cells import Cell
from bench.work import Work


def build(cell: Cell) -> Work:
    """x in and y out; in training dy and x in again and dx out."""
    stage = cell.shape
    case = Case(
        "dwconv_gelu_layernorm",
        (cell.batch, stage.height, stage.width, 2 * stage.dim),
        options=(("activation", "none"),),
    )
    return operators.build(
        cell, nchw.dwconv_gelu_layernorm, gelus=0, conv=True, passes=(2, 5), case=case
    )
