"""The 14 models under timm's conventions: `import convnest_kernels.timm`, then `timm.create_model`.

Importing this registers them. It needs timm, which nothing else in the package does. They are
untrained: there are no weights to load, and `pretrained=True` is timm's error.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm2d, NormMlpClassifierHead
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from convnest_kernels.models import VARIANTS, ConvNeSt
from convnest_kernels.modules import NestedBlock

__all__ = ["TimmConvNeSt"]  # register_model adds the 14 names

register_notrace_module(NestedBlock)  # torch.fx takes a block as one node


class TimmConvNeSt(ConvNeSt):
    """`ConvNeSt` with the methods that timm's tools call; the same parameters by the same names.

    Args:
        dims, depths, in_chans, num_classes, drop_path_rate, ...: as in `ConvNeSt`.
        drop_rate: dropout before the last linear layer.
        global_pool: "avg", "max", "avgmax", or "" for maps [N, num_classes, H, W].
        device, dtype: of all parameters.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, **arguments)
        self.drop_rate = drop_rate
        self.head: Any = NormMlpClassifierHead(
            self.num_features,
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            norm_layer=functools.partial(LayerNorm2d, eps=self.eps),
        )
        self._init_classifier()
        self.head_hidden_size = self.num_features
        # (stage, block) of each map; timm names the module by the stage where there is one for each
        self._map_ends = [(i, j) for i, blocks in enumerate(self._taps) for j in blocks]
        self.feature_info: Any = [dict(info) for info in self.feature_info]
        if len(self.stages) > 1:
            for i, info in enumerate(self.feature_info):
                info["module"] = f"stages.{i}"
        self.to(device=device, dtype=dtype)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map, normalize and classify it; `pre_logits` stops before the linear layer."""
        return self.head(x, pre_logits=pre_logits)

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, reset_other: bool = False
    ) -> None:
        """Replace the last linear layer; `reset_other` takes the norm before it out too."""
        self.num_classes = num_classes
        where = next(self.parameters())
        self.head.reset(
            num_classes,
            global_pool,
            reset_other=reset_other,
            in_features=self.num_features,
            device=where.device,
            dtype=where.dtype,
        )
        self._init_classifier()
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps that `feature_info` lists, and the last stage's output before them.

        Args:
            x: images.
            indices: of the maps: all if None, the last n if an int.
            norm: no effect, as in timm's ConvNeXt: there is no norm over the last map.
            stop_early: do not run the blocks after the last map taken.
            output_fmt: "NCHW".
            intermediates_only: give the list of maps alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self._map_ends), indices)
        x = self._embed(x)
        maps = []
        stages: Any = self.stages
        for i, stage in enumerate(stages):
            x = stage.downsample(x)
            for j, block in enumerate(stage.blocks):
                x = block(x)
                if (i, j) not in self._map_ends:
                    continue
                at = self._map_ends.index((i, j))
                if at in take:
                    maps.append(x)
                if stop_early and at == last:
                    return maps if intermediates_only else (x, maps)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] | None = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Take out what the maps `indices` do not need; give their indices."""
        take, last = feature_take_indices(len(self._map_ends), indices)
        stage, block = self._map_ends[last]
        pruned = last < len(self._map_ends) - 1
        stages: Any = nn.Sequential(*list(self.stages)[: stage + 1])
        stages[stage].blocks = stages[stage].blocks[: block + 1]
        self.stages = stages
        self._map_ends = self._map_ends[: last + 1]
        if pruned:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or pruned:
            self.reset_classifier(0, "", reset_other=True)
        return list(take)

    def _init_classifier(self) -> None:
        if not isinstance(self.head.fc, nn.Identity):
            nn.init.trunc_normal_(self.head.fc.weight, std=0.02)
            nn.init.zeros_(self.head.fc.bias)


def _cfg(name: str) -> dict[str, Any]:
    side = 224 // 16 if "iso" in name else 224 // 32
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (side, side),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
    }


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in VARIANTS})


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(
            TimmConvNeSt,
            name,
            pretrained,
            # The getter: maps of an isotropic model are not outputs of modules one after another.
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
            **{**VARIANTS[name], **kwargs},
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name}, untrained; further arguments are those of `TimmConvNeSt`."
    return create


for _name in VARIANTS:
    setattr(sys.modules[__name__], _name, register_model(_entrypoint(_name)))
