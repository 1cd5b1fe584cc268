"""The 14 models of the paper's Table 4 and the six configurations of its Table 2."""

from __future__ import annotations

import difflib
import fnmatch
from typing import Any

from .convnest import ConvNeSt


def _hierarchical(width: int, *depths: int) -> dict[str, Any]:
    return {
        "dims": tuple(width * 2**i for i in range(4)),
        "depths": depths,
        "patch_size": 4,
        "stem_norm": True,
        "res_scale": (None, None, 1.0, 1.0),
    }


def _isotropic(width: int, depth: int) -> dict[str, Any]:
    # Without a norm in the stem, as ConvNeXt's isotropic models: so counted, B has the paper's
    # 83.94 M parameters (83.945 M with one).
    return {
        "dims": (width,),
        "depths": (depth,),
        "patch_size": 16,
        "stem_norm": False,
        "res_scale": 1.0,
    }


# Table 4.
VARIANTS: dict[str, dict[str, Any]] = {
    "convnest_atto": _hierarchical(20, 2, 2, 9, 2),
    "convnest_femto": _hierarchical(24, 2, 2, 9, 2),
    "convnest_pico": _hierarchical(32, 2, 2, 9, 2),
    "convnest_nano": _hierarchical(40, 2, 2, 12, 2),
    "convnest_tiny": _hierarchical(48, 3, 3, 14, 3),
    "convnest_small": _hierarchical(56, 3, 3, 24, 3),
    "convnest_base": _hierarchical(72, 3, 3, 28, 3),
    "convnest_iso_atto": _isotropic(88, 13),
    "convnest_iso_femto": _isotropic(92, 15),
    "convnest_iso_pico": _isotropic(120, 15),
    "convnest_iso_nano": _isotropic(156, 15),
    "convnest_iso_tiny": _isotropic(192, 15),
    "convnest_iso_small": _isotropic(192, 22),
    "convnest_iso_base": _isotropic(384, 22),
}

# Table 2, by expansion ratio: overrides for any hierarchical model, as in
# create_model("convnest_tiny", **EXPANSION_ABLATION[8]).
EXPANSION_ABLATION: dict[int, dict[str, Any]] = {
    expansion: {"expansion": expansion, **_hierarchical(width, *depths)}
    for expansion, width, depths in (
        (4, 96, (3, 3, 8, 3)),
        (6, 80, (3, 3, 8, 3)),
        (8, 72, (3, 3, 6, 3)),
        (10, 64, (3, 3, 6, 3)),
        (12, 56, (3, 3, 8, 3)),
        (16, 48, (3, 3, 8, 3)),
    )
}


def create_model(
    name: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    features_only: bool = False,
    backend: str | None = None,
    recompute: str = "none",
    **overrides: Any,
) -> ConvNeSt:
    """Build one of the 14 ConvNeSt models, untrained.

    Args:
        name: one of `list_models()`, such as "convnest_tiny" or "convnest_iso_base".
        num_classes: 0 for pooled features [N, C] in place of logits.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth of the last block, growing linearly from the first.
        features_only: a backbone that gives a list of NCHW feature maps (`model.feature_info`).
        backend: of every operator; None follows `use_backend`, "eager" is plain PyTorch.
        recompute: "none", "conv" or "all": what backward computes again to save memory.
        overrides: any other argument of `ConvNeSt` and `NestedBlock`: dims, depths, expansion,
            kernel_size, design, norm, res_scale, layer_scale, shortcut, eps. `EXPANSION_ABLATION`
            holds those of Table 2.

    Raises ValueError for an unknown name, TypeError or ValueError for an argument, by its name.
    """
    if name not in VARIANTS:
        near = difflib.get_close_matches(str(name), VARIANTS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"name must be one of {', '.join(VARIANTS)}, got {name!r}{hint}")
    arguments = {
        "num_classes": num_classes,
        "in_chans": in_chans,
        "drop_path_rate": drop_path_rate,
        "features_only": features_only,
        "backend": backend,
        "recompute": recompute,
    }
    return ConvNeSt(**{**VARIANTS[name], **arguments, **overrides})


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` knows, small to large; `pattern` is a shell one ("*iso*")."""
    return [name for name in VARIANTS if fnmatch.fnmatchcase(name, pattern)]
