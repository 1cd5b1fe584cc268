"""Optimizer groups: layer-wise learning rate decay, no weight decay on vectors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

# Layers in order: the stem, what the "blocks" patterns find, the rest (the head).
_STEM, _BLOCKS, _HEAD = range(3)


def parameter_groups(
    model: nn.Module,
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
    lr: float | None = None,
    *,
    coarse: bool = False,
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into groups for a torch optimizer.

    Vectors (biases, norms, gamma, res_scale) get no weight decay. With layer_decay < 1 the learning
    rate shrinks by that factor from each layer to the one before it, the head keeping all of it,
    as in the fine-tuning of BEiT and ConvNeXt. Layers are the stem, then each block (a downsampling
    layer goes with the block after it), then the head, as `model.group_matcher` says.

    Args:
        model: with a `group_matcher(coarse)` in timm's convention, such as `ConvNeSt`.
        weight_decay: for matrices and convolutions.
        layer_decay: in (0, 1]; 1 puts everything into at most two groups.
        lr: learning rate of the head; None leaves "lr" out of the groups, so that the optimizer's
            own rate holds and a scheduler may use "lr_scale".
        coarse: one layer per stage in place of one per block.

    Returns:
        Groups with "params", "weight_decay", "lr_scale", "name" and, if given, "lr".

    Raises:
        ValueError: layer_decay is outside (0, 1] or weight_decay negative.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay}")
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")

    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    group_matcher: Any = model.group_matcher
    layers = _number_layers([name for name, _ in named], group_matcher(coarse=coarse))
    last = max(layers.values(), default=0)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named:
        decays = parameter.dim() > 1
        layer = last if layer_decay == 1 else layers[name]
        key = f"{'' if layer_decay == 1 else f'layer{layer}.'}{'decay' if decays else 'no_decay'}"
        if key not in groups:
            scale = layer_decay ** (last - layer)
            groups[key] = {
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "lr_scale": scale,
                "name": key,
                **({} if lr is None else {"lr": lr * scale}),
            }
        groups[key]["params"].append(parameter)
    return list(groups.values())


def _number_layers(names: list[str], matcher: Mapping[str, Any]) -> dict[str, int]:
    """Number the layers 0, 1, … in the order that a timm group matcher gives them."""
    keys = {name: _layer_key(name, matcher) for name in names}
    order = {key: layer for layer, key in enumerate(sorted(set(keys.values())))}
    return {name: order[key] for name, key in keys.items()}


def _layer_key(name: str, matcher: Mapping[str, Any]) -> tuple[int, ...]:
    if re.match(matcher["stem"], name):
        return (_STEM,)
    patterns = matcher["blocks"]
    for pattern, suffix in [(patterns, None)] if isinstance(patterns, str) else patterns:
        found = re.match(pattern, name)
        if found:
            return (_BLOCKS, *map(int, found.groups()), *(suffix or ()))
    return (_HEAD,)
