"""What detection and segmentation share: a backbone with normed maps, and its optimizer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convnest_kernels.models import create_model, parameter_groups
from convnest_kernels.modules import LayerNorm2d
from convnest_kernels.train.errors import UsageError
from recipe import loop, state

# Stochastic depth where the command line does not say: ConvNeXt's of both tasks for its tiny model,
# and of segmentation for its base model.
DROP_PATH = {"tiny": 0.4, "small": 0.4, "base": 0.4}


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    parser = loop.parser(description, **defaults)
    parser.add_argument("--weights", type=Path, help="a trained classifier's .safetensors file")
    parser.add_argument("--layer-decay", type=float, default=0.9, help="lr factor, layer to layer")
    parser.set_defaults(**defaults)
    return parser


class Backbone(nn.Module):
    """The four stages of a hierarchical model, each map with a LayerNorm: strides 4 to 32."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        if "iso" in args.model:
            raise UsageError(
                f"--model must be a hierarchical one, dense tasks need four strides; "
                f"got {args.model}"
            )
        if args.drop_path is None:
            args.drop_path = DROP_PATH.get(args.model.rpartition("_")[2], 0.0)
        torch.manual_seed(args.seed)
        try:
            self.body = create_model(
                args.model,
                drop_path_rate=args.drop_path,
                recompute=args.recompute,
                features_only=True,
            )
        except ValueError as error:
            raise UsageError(f"--model: {error}") from error
        if args.weights is not None:
            state.load_weights(args.weights, self.body, without="head.")
        self.channels: list[int] = self.body.feature_info.channels()
        self.norms = nn.ModuleList(LayerNorm2d(channels, eps=1e-6) for channels in self.channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [norm(x) for norm, x in zip(self.norms, self.body(x), strict=True)]


def optimizer(
    model: nn.Module, backbone: Backbone, args: argparse.Namespace
) -> torch.optim.Optimizer:
    """AdamW; the learning rate decays from layer to layer of the body, vectors do not decay."""
    groups = parameter_groups(backbone.body, args.weight_decay, args.layer_decay)
    body = {id(parameter) for group in groups for parameter in group["params"]}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in body]
    for decays in (True, False):
        chosen = [p for p in rest if (p.dim() > 1) == decays]
        groups.append({"params": chosen, "weight_decay": args.weight_decay if decays else 0.0})
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999))
