"""dwconv_gelu_layernorm: LN(GELU(DW(x))), at 12·C channels."""

from bench import nchw, operators
from bench.cells import Cell
from bench.work import Work


def build(cell: Cell) -> Work:
    """x in and y out; in training dy and x in again and dx out."""
    return operators.build(cell, nchw.dwconv_gelu_layernorm, gelus=1, conv=True, passes=(2, 5))
