"""What a model says about its feature maps, in timm's terms."""

from __future__ import annotations

from typing import TypedDict


class Feature(TypedDict):
    """One feature map: its channels, its stride in the input image, and the module it leaves."""

    num_chs: int
    reduction: int
    module: str


class FeatureInfo(list[Feature]):
    """The feature maps of a model, shallow to deep; a list of dicts as in timm."""

    def channels(self) -> list[int]:
        """Channels of each map."""
        return [feature["num_chs"] for feature in self]

    def reduction(self) -> list[int]:
        """Stride of each map: how many input pixels, along an axis, one of its pixels covers."""
        return [feature["reduction"] for feature in self]

    def module_name(self) -> list[str]:
        """Qualified name of the module whose output each map is."""
        return [feature["module"] for feature in self]
