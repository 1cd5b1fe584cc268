"""ConvNeSt: a stem, stages of nested blocks, a classifier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..modules import LayerNorm2d, NestedBlock
from .features import FeatureInfo

# What an isotropic model, which has one stage, gives as feature maps: after each quarter.
_MAPS_OF_ONE_STAGE = 4


class ConvNeSt(nn.Module):
    """ConvNeSt (Table 4 of "Convolution on your 12× wide feature"), hierarchical or isotropic.

    A stem that patches the image (convolution, LayerNorm), stages of `NestedBlock`s with LN and a
    2×2 stride-2 convolution between them, and a head: global average pool, LN, linear. Parameters
    are named as in timm's ConvNeXt: `stem.{0,1}`, `stages.i.downsample.{0,1}`, `stages.i.blocks.j`,
    `head.norm`, `head.fc`. Inside, everything is channels_last; a contiguous input is converted
    once. Isotropic models are a single stage, without a norm in the stem, as ConvNeXt's are.

    Args:
        dims: channels of each stage.
        depths: blocks of each stage.
        num_classes: 0 leaves the linear layer out; the model then gives [N, dims[-1]].
        in_chans: channels of the image.
        patch_size: kernel and stride of the stem: 4, or 16 for isotropic models.
        stem_norm: whether a LayerNorm follows the stem's convolution.
        res_scale: initial ResScale of the blocks, one value for all or one for each stage; None
            for a plain shortcut. The paper's models have it in stages 3 and 4 (as MetaFormer
            baselines) and in every block of the isotropic ones.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        features_only: give a list of feature maps and no logits, see `forward_intermediates`; there
            is no head, so load a classifier's state dict with strict=False.
        eps: of every norm.
        backend: of every operator, as in `convnest_kernels.ops`; None follows `use_backend`.
        recompute: "none", "conv" or "all", as in `NestedBlock`.
        block: further arguments of every `NestedBlock` (expansion, kernel_size, design, norm,
            shortcut, layer_scale).

    Input: [N, in_chans, H, W], floating point, H and W at least the model's total stride (32, or
    16 for isotropic models). Other sizes need not be multiples of it: convolutions drop what is
    left over at the right and bottom, as torch's do.

    `feature_info` lists the feature maps with channels ("num_chs") and stride ("reduction").

    Raises TypeError or ValueError naming the argument, here and in forward.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        patch_size: int = 4,
        stem_norm: bool = True,
        res_scale: float | Sequence[float | None] | None = 1.0,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
        eps: float = 1e-6,
        backend: str | None = None,
        recompute: str = "none",
        **block: Any,
    ) -> None:
        super().__init__()
        _check_sizes("dims", dims, 1)
        _check_sizes("depths", depths, 1)
        _check_int("num_classes", num_classes, 0)
        _check_int("in_chans", in_chans, 1)
        _check_int("patch_size", patch_size, 1)
        if len(depths) != len(dims):
            raise ValueError(f"depths must have one entry per stage, {len(dims)}, got {depths}")
        scales = _for_each_stage("res_scale", res_scale, len(dims))
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")

        self.num_classes = 0 if features_only else num_classes
        self.num_features = dims[-1]
        self.in_chans = in_chans
        self.features_only = features_only
        self.eps = eps
        self.reduction = patch_size * 2 ** (len(dims) - 1)
        self._recompute = recompute

        stem: list[nn.Module] = [nn.Conv2d(in_chans, dims[0], patch_size, patch_size)]
        if stem_norm:
            stem.append(LayerNorm2d(dims[0], eps=eps))
        self.stem = nn.Sequential(*stem)

        last = max(sum(depths) - 1, 1)
        rates = [drop_path_rate * i / last for i in range(sum(depths))]
        stages = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            blocks = [
                NestedBlock(
                    dim,
                    res_scale=scales[i],
                    drop_path=rates.pop(0),
                    eps=eps,
                    recompute=recompute,
                    backend=backend,
                    **block,
                )
                for _ in range(depth)
            ]
            stages.append(_Stage(dims[i - 1] if i else None, dim, blocks, eps))
        self.stages = nn.Sequential(*stages)

        self.head = None if features_only else _Head(dims[-1], num_classes, eps)
        self._taps, self.feature_info = _feature_maps(dims, depths, patch_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every weight from a normal truncated at ±2, std 0.02; set biases to zero."""
        for module in self.modules():
            if isinstance(module, NestedBlock):
                continue  # has drawn its own
            if isinstance(module, nn.Linear) or _is_dense(module):
                _init_layer(module)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Give logits [N, num_classes], or a list of feature maps for `features_only`."""
        if self.features_only:
            return self.forward_intermediates(x)
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Give the last stage's map, [N, dims[-1], H / reduction, W / reduction]."""
        return self.stages(self._embed(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map [N, dims[-1], H, W] and classify it; `pre_logits` stops at [N, dims[-1]]."""
        return self._require_head()(x, pre_logits)

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Give the feature maps that `feature_info` lists, NCHW in channels_last, unnormalised.

        A hierarchical model gives each stage's output (strides 4, 8, 16, 32). An isotropic model
        gives four maps of one stride, 16, after each quarter of its blocks, as plain vision
        transformers do for dense prediction.
        """
        x = self._embed(x)
        maps = []
        for stage, taps in zip(self.stages, self._taps, strict=True):
            assert isinstance(stage, _Stage)
            x = stage.downsample(x)
            for i, block in enumerate(stage.blocks):
                x = block(x)
                if i in taps:
                    maps.append(x)
        return maps

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or nn.Identity where num_classes is 0."""
        return self._require_head().fc

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last linear layer by a fresh one for `num_classes`; 0 takes it out."""
        _check_int("num_classes", num_classes, 0)
        head = self._require_head()
        self.num_classes = num_classes
        head.fc = _classifier(self.num_features, num_classes).to(head.norm.weight)
        if num_classes:
            _init_layer(head.fc)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in backward from its input (recompute="all"), or as built."""
        for module in self.modules():
            if isinstance(module, NestedBlock):
                module.recompute = "all" if enable else self._recompute

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameter names into layers, in timm's convention.

        One layer per block, or per stage if `coarse` (an isotropic model has one stage). What no
        pattern matches is the last layer, the head. `parameter_groups` makes use of it.
        """
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),  # with the stage's first block
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def _embed(self, x: Tensor) -> Tensor:
        _check_images(x, self.in_chans, self.reduction)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        # An image of one channel is in both formats at once, and the convolution may choose.
        return x.contiguous(memory_format=torch.channels_last)

    def _require_head(self) -> _Head:
        if self.head is None:
            raise RuntimeError("a model built with features_only=True has no head")
        return self.head


def _check_images(x: Tensor, in_chans: int, reduction: int) -> None:
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"x must be [N, {in_chans}, H, W], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point (scale images first), got {x.dtype}")
    if x.shape[2] < reduction or x.shape[3] < reduction:
        raise ValueError(
            f"x must be at least {reduction} x {reduction} pixels, the model's total "
            f"stride, or its last maps would be empty; got {x.shape[2]} x {x.shape[3]}"
        )


torch.fx.wrap("_check_images")  # it branches on what a trace does not know


class _Stage(nn.Module):
    """LN and a 2×2 stride-2 convolution where there is a stage before, then blocks."""

    def __init__(
        self, in_dim: int | None, dim: int, blocks: Sequence[NestedBlock], eps: float
    ) -> None:
        super().__init__()
        self.downsample: nn.Module = nn.Identity()
        if in_dim is not None:
            self.downsample = nn.Sequential(
                LayerNorm2d(in_dim, eps=eps), nn.Conv2d(in_dim, dim, kernel_size=2, stride=2)
            )
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class _Head(nn.Module):
    """Global average pool, LN, linear."""

    def __init__(self, dim: int, num_classes: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.fc = _classifier(dim, num_classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.norm(x.mean(dim=(2, 3)))
        return x if pre_logits else self.fc(x)


def _classifier(dim: int, num_classes: int) -> nn.Module:
    return nn.Linear(dim, num_classes) if num_classes else nn.Identity()


def _is_dense(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1


def _init_layer(layer: nn.Module) -> None:
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    assert layer.bias is not None
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)


def _feature_maps(
    dims: Sequence[int], depths: Sequence[int], patch_size: int
) -> tuple[list[list[int]], FeatureInfo]:
    """After which blocks of each stage a feature map is taken, and what the maps are."""
    if len(dims) == 1:
        quarters = range(1, _MAPS_OF_ONE_STAGE + 1)
        taps = [sorted({math.ceil(depths[0] * q / _MAPS_OF_ONE_STAGE) - 1 for q in quarters})]
    else:
        taps = [[depth - 1] for depth in depths]
    info = FeatureInfo(
        {
            "num_chs": dim,
            "reduction": patch_size * 2**stage,
            "module": f"stages.{stage}.blocks.{block}",
        }
        for stage, dim in enumerate(dims)
        for block in taps[stage]
    )
    return taps, info


def _for_each_stage(
    name: str, value: float | Sequence[float | None] | None, stages: int
) -> Sequence[float | None]:
    if not isinstance(value, Sequence):
        return (value,) * stages
    if len(value) != stages:
        raise ValueError(f"{name} must have one entry per stage, {stages}, got {value}")
    return value


def _check_sizes(name: str, values: Sequence[int], smallest: int) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise TypeError(f"{name} must be a sequence with one int per stage, got {values!r}")
    for i, value in enumerate(values):
        _check_int(f"{name}[{i}]", value, smallest)


def _check_int(name: str, value: int, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < smallest:
        raise ValueError(f"{name} must be at least {smallest}, got {value}")
