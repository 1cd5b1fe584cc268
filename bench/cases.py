"""The one table of cases that tests and benchmarks share: operators, shapes, options, inputs.

`CASES` are small and awkward, for correctness; `stage_cases` are the shapes of the ConvNeSt models,
for speed. `make_inputs` turns either into tensors, the same ones for every dtype up to rounding.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from convnest_kernels import ops, reference
from convnest_kernels.models import VARIANTS

IMAGE_SIZE = 224


@dataclass(frozen=True)
class Case:
    """One call of an operator: its activation's shape, its options and what is unusual about it."""

    operator: str
    shape: tuple[int, ...]
    kernel_size: int = 7
    options: tuple[tuple[str, Any], ...] = ()
    affine: bool = True  # LayerNorm has weight and bias
    bias: bool = True  # the convolution has a bias; layernorm_residual a scale
    ln_bias: float = 0.0  # added to the LayerNorm bias: large, padding before the norm shows
    layout: str = "contiguous"  # or "channels_first", "sliced" (a view with a storage offset)

    def __str__(self) -> str:
        parts = [self.operator, "x".join(map(str, self.shape))]
        if self.operator in CONV_OPERATORS:
            parts.append(f"k{self.kernel_size}")
        parts += [f"{name}={value}" for name, value in self.options]
        parts += [] if self.affine else ["no_affine"]
        parts += [] if self.bias else ["no_bias"]
        parts += [f"ln_bias={self.ln_bias:g}"] if self.ln_bias else []
        parts += [] if self.layout == "contiguous" else [self.layout]
        return "-".join(parts)

    @property
    def kwargs(self) -> dict[str, Any]:
        """The operator's options as keyword arguments."""
        return dict(self.options)

    @property
    def function(self) -> Callable[..., Tensor]:
        """The public operator."""
        return getattr(ops, self.operator)

    @property
    def formula(self) -> Callable[..., Tensor]:
        """Its eager reference."""
        return getattr(reference, self.operator)


CONV_OPERATORS = ("nested_conv", "dwconv_gelu_layernorm")
POINTWISE_OPERATORS = ("gelu_layernorm", "layernorm_residual")
OPERATORS = CONV_OPERATORS + POINTWISE_OPERATORS

# Every variant of each operator's formula.
OPTIONS: dict[str, tuple[tuple[tuple[str, Any], ...], ...]] = {
    "nested_conv": ((), (("shortcut", False),)),
    "dwconv_gelu_layernorm": (
        (),
        (("norm_first", True),),
        (("activation", "none"),),
        (("activation", "none"), ("norm_first", True)),
    ),
    "gelu_layernorm": ((), (("norm_first", True),)),
    "layernorm_residual": ((),),
}

# N, H, W, C: one channel, C off every tile, maps smaller than the kernel, long and narrow ones.
_CONV_SHAPES = (
    (1, 1, 1, 1),
    (2, 1, 3, 7),
    (3, 5, 9, 7),
    (2, 7, 7, 50),
    (1, 57, 31, 7),
    (1, 14, 14, 240),
    (1, 3, 4, 576),
)
_POINTWISE_SHAPES = ((1, 1, 1, 1), (5, 7), (3, 5, 9, 50), (1, 57, 31, 7), (2, 3, 4, 240), (6, 576))


def _cases() -> list[Case]:
    cases = []
    for operator in CONV_OPERATORS:
        plain, *variants = OPTIONS[operator]
        cases += [Case(operator, shape, options=plain) for shape in _CONV_SHAPES]
        cases += [Case(operator, (2, 6, 9, 50), options=variant) for variant in variants]
        cases += [Case(operator, (1, 8, 11, 34), kernel_size=k) for k in (3, 5, 9, 11, 13)]
        cases += [
            Case(operator, (2, 5, 8, 40), affine=False, bias=False),
            Case(operator, (1, 9, 8, 33), ln_bias=8.0),
            Case(operator, (2, 6, 5, 24), layout="channels_first"),
            Case(operator, (2, 6, 5, 24), layout="sliced"),
        ]
    for operator in POINTWISE_OPERATORS:
        plain, *variants = OPTIONS[operator]
        cases += [Case(operator, shape, options=plain) for shape in _POINTWISE_SHAPES]
        cases += [Case(operator, (2, 6, 9, 50), options=variant) for variant in variants]
        cases += [
            Case(operator, (2, 5, 8, 40), affine=False, bias=False),
            Case(operator, (2, 6, 5, 24), layout="channels_first"),
            Case(operator, (2, 6, 5, 24), layout="sliced"),
        ]
    return cases


CASES = _cases()


BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DTYPES = ("float32", "bfloat16", "float16")
# What the activations of a [N, C, H, W] network are in memory; operators take NHWC.
MEMORY_FORMATS = ("channels_last", "contiguous")


@dataclass(frozen=True)
class Stage:
    """A stage of a model, or all of an isotropic one: its map, C, and 12·C channels inside."""

    height: int
    width: int
    dim: int
    blocks: int

    @property
    def wide(self) -> int:
        """D, the channels inside a block."""
        return 12 * self.dim


def stages(variant: str, image_size: int = IMAGE_SIZE) -> list[Stage]:
    """The stages of a model for square images: four, or one for an isotropic model."""
    config = VARIANTS[variant]
    first = image_size // config["patch_size"]
    return [
        Stage(first >> i, first >> i, dim, depth)
        for i, (dim, depth) in enumerate(zip(config["dims"], config["depths"], strict=True))
    ]


def stage_cases(
    variant: str, batch: int, operator: str = "nested_conv", image_size: int = IMAGE_SIZE
) -> list[Case]:
    """An operator at every stage of a model: wide (12·C), or narrow where a block has it so."""
    narrow = operator == "layernorm_residual"
    return [
        Case(operator, (batch, s.height, s.width, s.dim if narrow else s.wide))
        for s in stages(variant, image_size)
    ]


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call, by name in the operator's order, and a cotangent for its output."""

    tensors: dict[str, Tensor | None]
    dy: Tensor
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> list[Tensor | None]:
        """The operator's positional arguments."""
        return list(self.tensors.values())

    @property
    def wanted(self) -> list[Tensor]:
        """The tensors to take gradients of."""
        return [tensor for tensor in self.tensors.values() if tensor is not None]

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype, as new leaves."""
        tensors = {
            name: None if x is None else x.detach().to(dtype).requires_grad_(x.requires_grad)
            for name, x in self.tensors.items()
        }
        return Inputs(tensors, self.dy.to(dtype), self.kwargs)


def make_inputs(
    case: Case,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype | None = None,
    device: str = "cpu",
    requires_grad: bool = True,
) -> Inputs:
    """Random inputs of a case, seeded by its name; parameters as trained networks have them."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    channels = case.shape[-1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def activation() -> Tensor:
        x = normal(*case.shape).to(device, dtype)
        if case.layout == "channels_first":
            return x.movedim(-1, 1).contiguous().movedim(1, -1)
        if case.layout == "sliced":
            return torch.nn.functional.pad(x, (3, 2))[..., 3:-2]
        return x

    def vector(mean: float, spread: float = 0.2) -> Tensor:
        return (mean + spread * normal(channels)).to(device, parameter_dtype or dtype)

    norm = {
        "ln_weight": vector(1.0) if case.affine else None,
        "ln_bias": vector(case.ln_bias) if case.affine else None,
    }
    tensors: dict[str, Tensor | None]
    if case.operator in CONV_OPERATORS:
        k = case.kernel_size
        weight = (normal(channels, 1, k, k) / k).to(device, parameter_dtype or dtype)
        name = "h" if case.operator == "nested_conv" else "x"
        bias = vector(0.0) if case.bias else None
        tensors = {name: activation(), "conv_weight": weight, "conv_bias": bias, **norm}
    elif case.operator == "gelu_layernorm":
        tensors = {"x": activation(), **norm}
    else:
        scale = vector(1.0) if case.bias else None
        tensors = {"t": activation(), "x": activation(), **norm, "scale": scale}
    for tensor in tensors.values():
        if tensor is not None:
            tensor.requires_grad_(requires_grad)
    return Inputs(tensors, normal(*case.shape).to(device, dtype), case.kwargs)
