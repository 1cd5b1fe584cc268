"""nested_conv: GELU(g + DW(LN(g))), g = GELU(h), at 12·C channels."""

from bench import nchw, operators
from bench.cells import Cell
from bench.work import Work


def build(cell: Cell) -> Work:
    """h in and v out; in training dv and h in again and dh out (u and statistics made again)."""
    return operators.build(cell, nchw.nested_conv, gelus=2, conv=True, passes=(2, 5))
