"""A UperNet-style head: pyramid pooling on the last map, a top-down pyramid over all.

Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018 (arXiv 1807.10221).
In place of its batch norms are group norms: with two images on a GPU statistics over a batch are
poor, and results would depend on how a batch is spread over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOLS = (1, 2, 3, 6)
GROUPS = 32


class UperHead(nn.Module):
    """Class logits [N, classes, H/4, W/4] from four maps of strides 4, 8, 16, 32."""

    def __init__(self, in_channels: Sequence[int], channels: int, classes: int) -> None:
        super().__init__()
        last = in_channels[-1]
        self.pools = nn.ModuleList(_layer(last, channels, 1) for _ in POOLS)
        self.pooled = _layer(last + len(POOLS) * channels, channels, 3)
        self.laterals = nn.ModuleList(_layer(c, channels, 1) for c in in_channels[:-1])
        self.smooths = nn.ModuleList(_layer(channels, channels, 3) for _ in in_channels[:-1])
        self.fuse = _layer(len(in_channels) * channels, channels, 3)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        last = maps[-1]
        pooled = [
            _resize(layer(F.adaptive_avg_pool2d(last, size)), last)
            for size, layer in zip(POOLS, self.pools, strict=True)
        ]
        top = self.pooled(torch.cat([last, *pooled], 1))
        levels = [top]
        for x, lateral in zip(reversed(maps[:-1]), reversed(self.laterals), strict=True):
            x = lateral(x)
            levels.append(x + _resize(levels[-1], x))
        levels.reverse()
        levels = [f(x) for f, x in zip(self.smooths, levels[:-1], strict=True)] + [top]
        fused = self.fuse(torch.cat([_resize(x, levels[0]) for x in levels], 1))
        return self.classifier(fused)


class AuxiliaryHead(nn.Module):
    """Class logits from the third map alone, which helps the backbone to learn."""

    def __init__(self, in_channels: int, channels: int, classes: int) -> None:
        super().__init__()
        self.layer = _layer(in_channels, channels, 3)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layer(x))


def _layer(in_channels: int, channels: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.GroupNorm(GROUPS, channels),
        nn.ReLU(),
    )


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)
