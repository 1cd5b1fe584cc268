"""layernorm_residual: scale ⊙ x + LN(t), at C channels, where the block has it."""

from bench import nchw, operators
from bench.cells import Cell
from bench.work import Work


def build(cell: Cell) -> Work:
    """t and x in, y out; in training dy, t and x (for the scale's gradient) in, dt and dx out."""
    return operators.build(
        cell, nchw.layernorm_residual, gelus=0, conv=False, passes=(3, 8), activations=2
    )
