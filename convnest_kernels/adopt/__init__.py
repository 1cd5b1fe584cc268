"""`accelerate`: our operators inside the ConvNeXt models of other libraries.

accelerate.py   finds the blocks, swaps them, and says what it did
families.py     how each library writes its block
fused.py        the class that a swapped block gets, and when it steps aside
gelu_linear.py  GELU and the linear layer after it, keeping one wide tensor for backward
matmul.py       float32 linear layers by the faster of the two libraries that torch has
report.py       what `accelerate` returns
"""

from .accelerate import AccelerateError, accelerate
from .report import Layer, Report, Skipped

__all__ = ["AccelerateError", "Layer", "Report", "Skipped", "accelerate"]
