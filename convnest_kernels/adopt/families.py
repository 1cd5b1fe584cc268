"""How each library writes its ConvNeXt block, and the same block over our operators.

Nothing here imports a library: a model of one has loaded it already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn


class Parts(NamedTuple):
    """The layers of a block that ours take the place of, and whose hooks would not run."""

    conv: Any
    norm: Any
    around: tuple[nn.Module, ...]  # containers and permutations beside conv and norm
    fc1: Any
    act: Any
    fc2: Any
    inside: tuple[nn.Module, ...]  # of the pointwise half: containers, and dropouts if inactive


@dataclass(frozen=True)
class Family:
    """One library's block.

    `names` is what the library's forward refers to (its co_names): a forward that refers to
    anything else is of a version that this was not written for, and is skipped.
    """

    library: str
    module: str
    block: str
    names: frozenset[str]
    parts: Callable[[Any], Parts]
    pointwise: Callable[[Any, Tensor], Tensor]  # z → t, the library's own pointwise half
    join: Callable[[Any, Tensor, Tensor], Tensor]  # t, x [N, C, H, W] → y
    norms: frozenset[tuple[str, str]] = field(default_factory=frozenset)  # module and class

    @property
    def kind(self) -> str:
        return f"{self.library} {self.block}"

    def loaded(self) -> type[nn.Module] | None:
        """The library's class, where the library is loaded."""
        return getattr(sys.modules.get(self.module), self.block, None)


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


def to_nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


# timm: conv_dw, norm, mlp; with conv_mlp the pointwise half is in NCHW.


def _timm_parts(block: Any) -> Parts:
    mlp = block.mlp
    names = ("drop1", "norm", "drop2", "grn")
    inner = tuple(getattr(mlp, name) for name in names if hasattr(mlp, name))
    return Parts(block.conv_dw, block.norm, (), mlp.fc1, mlp.act, mlp.fc2, (mlp, *inner))


def _timm_pointwise(block: Any, z: Tensor) -> Tensor:
    if block.use_conv_mlp:
        return block.mlp(to_nchw(z)).permute(0, 2, 3, 1)
    return block.mlp(z)


def _timm_join(block: Any, t: Tensor, x: Tensor) -> Tensor:
    t = to_nchw(t)
    if block.gamma is not None:
        t = t.mul(block.gamma.reshape(1, -1, 1, 1))
    return block.drop_path(t) + block.shortcut(x)


# torchvision: one nn.Sequential.


def _torchvision_parts(block: Any) -> Parts:
    conv, to_last, norm, fc1, act, fc2, _ = block.block
    return Parts(conv, norm, (block.block, to_last), fc1, act, fc2, ())


def _torchvision_pointwise(block: Any, z: Tensor) -> Tensor:
    for layer in tuple(block.block)[3:6]:
        z = layer(z)
    return z


def _torchvision_join(block: Any, t: Tensor, x: Tensor) -> Tensor:
    y = block.stochastic_depth(block.layer_scale * block.block[6](t))
    y += x
    return y


# transformers: ConvNeXt, V2 (a GRN in the pointwise half), DINOv3.


def _transformers_pointwise(block: Any, z: Tensor) -> Tensor:
    return block.pwconv2(block.act(block.pwconv1(z)))


def _v2_pointwise(block: Any, z: Tensor) -> Tensor:
    return block.pwconv2(block.grn(block.act(block.pwconv1(z))))


def _transformers_join(block: Any, t: Tensor, x: Tensor) -> Tensor:
    if block.layer_scale_parameter is not None:
        t = block.layer_scale_parameter * t
    return x + block.drop_path(to_nchw(t))


def _v2_join(block: Any, t: Tensor, x: Tensor) -> Tensor:
    return x + block.drop_path(to_nchw(t))


def _dinov3_join(block: Any, t: Tensor, x: Tensor) -> Tensor:
    return x + block.drop_path(to_nchw(t * block.gamma))


_TORCH_NORM = ("torch.nn.modules.normalization", "LayerNorm")


def _transformers(name: str, prefix: str, **options: Any) -> Family:
    module = f"transformers.models.{name}.modeling_{name}"
    norm = (module, f"{prefix}LayerNorm")
    return Family(
        "transformers",
        module,
        f"{prefix}Layer",
        norms=frozenset({_TORCH_NORM, norm}),
        **options,
    )


FAMILIES = (
    Family(
        "timm",
        "timm.models.convnext",
        "ConvNeXtBlock",
        names=_names("conv_dw drop_path gamma mlp mul norm permute reshape shortcut use_conv_mlp"),
        parts=_timm_parts,
        pointwise=_timm_pointwise,
        join=_timm_join,
        norms=frozenset(
            {
                _TORCH_NORM,
                ("timm.layers.norm", "LayerNorm"),
                ("timm.layers.norm", "LayerNorm2d"),
            }
        ),
    ),
    Family(
        "torchvision",
        "torchvision.models.convnext",
        "CNBlock",
        names=frozenset({"block", "layer_scale", "stochastic_depth"}),
        parts=_torchvision_parts,
        pointwise=_torchvision_pointwise,
        join=_torchvision_join,
        norms=frozenset({_TORCH_NORM}),
    ),
    _transformers(
        "convnext",
        "ConvNext",
        names=_names(
            "act drop_path dwconv layer_scale_parameter layernorm permute pwconv1 pwconv2"
        ),
        parts=lambda block: Parts(
            block.dwconv, block.layernorm, (), block.pwconv1, block.act, block.pwconv2, ()
        ),
        pointwise=_transformers_pointwise,
        join=_transformers_join,
    ),
    _transformers(
        "convnextv2",
        "ConvNextV2",
        names=_names("act drop_path dwconv grn layernorm permute pwconv1 pwconv2"),
        parts=lambda block: Parts(
            block.dwconv, block.layernorm, (), block.pwconv1, block.act, block.pwconv2, (block.grn,)
        ),
        pointwise=_v2_pointwise,
        join=_v2_join,
    ),
    _transformers(
        "dinov3_convnext",
        "DINOv3ConvNext",
        names=_names(
            "activation_fn depthwise_conv drop_path gamma layer_norm permute "
            "pointwise_conv1 pointwise_conv2"
        ),
        parts=lambda block: Parts(
            block.depthwise_conv,
            block.layer_norm,
            (),
            block.pointwise_conv1,
            block.activation_fn,
            block.pointwise_conv2,
            (),
        ),
        pointwise=lambda block, z: block.pointwise_conv2(
            block.activation_fn(block.pointwise_conv1(z))
        ),
        join=_dinov3_join,
    ),
)


def family_of(module: nn.Module) -> Family | None:
    """The family whose block `module` is, subclasses included."""
    for family in FAMILIES:
        block = family.loaded()
        if block is not None and isinstance(module, block):
            return family
    return None
