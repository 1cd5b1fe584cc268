"""Train a ConvNeSt on ImageNet with a teacher, by the NKD loss (the paper's Table 11).

    torchrun --nproc-per-node 8 examples/distill.py --model convnest_pico --teacher regnety_160 \
        --teacher-pretrained --data imagenet/ --output runs/pico --dtype bfloat16

The teacher is any model of timm with the classes of --data, by its name there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from convnest_kernels.train.errors import UsageError
from imagenet import set_recipe
from recipe import classify, loop, parallel
from recipe.nkd import nkd_loss


def build_teacher(args: argparse.Namespace, classes: int) -> nn.Module:
    """A timm model that takes the student's images, in evaluation mode, without gradients."""
    options = {} if args.teacher_weights is None else {"checkpoint_path": str(args.teacher_weights)}
    try:
        teacher = timm.create_model(
            args.teacher, pretrained=args.teacher_pretrained, num_classes=classes, **options
        )
    except (RuntimeError, FileNotFoundError) as error:
        raise UsageError(f"--teacher {args.teacher}: {str(error).splitlines()[0]}") from error
    return Teacher(teacher.eval().requires_grad_(False))


class Teacher(nn.Module):
    """A teacher with the mean and standard deviation of its own training."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config = resolve_data_config({}, model=model)
        mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
        scale = torch.tensor(classify.STD) / std
        shift = (torch.tensor(classify.MEAN) - mean) / std
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("shift", shift[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x * self.scale + self.shift)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = classify.parser(__doc__, batch=4096, micro_batch=128, lr=4e-3, ema=0.9999)
    add = parser.add_argument
    add("--teacher", required=True, help="a model's name in timm")
    add("--teacher-pretrained", action="store_true", help="download timm's weights")
    add("--teacher-weights", type=Path, help="a file of weights for the teacher")
    add("--nkd-gamma", type=float, default=1.5, help="weight of the classes beside the target")
    add("--nkd-temperature", type=float, default=1.0)
    args = parser.parse_args(arguments)
    if args.teacher_pretrained == (args.teacher_weights is not None):
        raise UsageError("give either --teacher-pretrained or --teacher-weights")
    set_recipe(args)
    with parallel.joined(args.device) as ranks:
        data = classify.open_folder(args)
        student = classify.build(args, data[2])
        teacher = build_teacher(args, data[2]).to(ranks.device, loop.DTYPES[args.dtype])
        return classify.train(args, ranks, student, data, _loss(args, teacher))


def _loss(args: argparse.Namespace, teacher: nn.Module) -> Any:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        logits = model(x)
        with torch.no_grad():
            expected = teacher(x)
        # A mixed image's target is the class that has most of it.
        nkd = nkd_loss(logits, expected, y.argmax(1), args.nkd_gamma, args.nkd_temperature)
        return classify.soft_cross_entropy(logits.to(nkd.dtype), y.to(nkd.dtype)) + nkd

    return loss


if __name__ == "__main__":
    loop.run(main)
