"""Image classification, as imagenet.py, finetune.py and distill.py have it in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_dataset
from timm.data.mixup import mixup_target
from timm.data.transforms_factory import create_transform
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from convnest_kernels.models import create_model
from convnest_kernels.train.errors import UsageError
from recipe import loop
from recipe.batches import Key, Plan, seed_all
from recipe.parallel import Ranks, Share

MEAN, STD = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
soft_cross_entropy = SoftTargetCrossEntropy()


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The arguments of classification; Tables 9 and 10 where the script does not say otherwise."""
    parser = loop.parser(description, **defaults)
    add = parser.add_argument
    add("--epochs", type=int, default=300)
    add("--warmup-epochs", type=int, help="epochs of linear warm-up")
    add("--image-size", type=int, default=224)
    add("--crop-pct", type=float, default=0.875, help="centre crop of validation images")
    add("--layer-decay", type=float, default=1.0, help="learning rate factor from layer to layer")
    add("--label-smoothing", type=float, default=0.1)
    add("--randaugment", default="rand-m9-mstd0.5-inc1", help="timm's name; '' for none")
    add("--mixup", type=float, default=0.8, help="alpha; 0 for none")
    add("--cutmix", type=float, default=1.0, help="alpha; 0 for none")
    add("--mix-batch", type=int, default=64, help="images that share a draw of Mixup or CutMix")
    add("--erasing", type=float, default=0.25, help="probability of random erasing")
    parser.set_defaults(**defaults)
    return parser


def open_folder(args: argparse.Namespace) -> tuple[Any, Any, int]:
    """Training and validation images of --data with their transforms, and the class count."""
    sides = []
    for split in ("train", "validation"):
        try:
            side = create_dataset("", root=str(args.data), split=split)
        except (RuntimeError, FileNotFoundError) as error:
            raise UsageError(f"--data must hold train/ and val/ class folders: {error}") from error
        sides.append(side)
    train, val = sides
    classes = train.reader.class_to_idx
    if train.reader.root == val.reader.root:
        raise UsageError(f"--data must hold train/ and val/ class folders, got {args.data}")
    if val.reader.class_to_idx != classes:
        raise UsageError(f"--data must have the same classes in train/ and val/, got {args.data}")
    train.transform = create_transform(
        args.image_size,
        is_training=True,
        auto_augment=args.randaugment or None,
        interpolation="bicubic",
        re_prob=args.erasing,
        re_mode="pixel",
    )
    _keep_a_bit(train.transform)
    val.transform = create_transform(
        args.image_size, interpolation="bicubic", crop_pct=args.crop_pct
    )
    return train, val, len(classes)


def _keep_a_bit(transform: Any) -> None:
    """Let RandAugment posterize to 1 bit at least: its noise asks for 0, which Pillow refuses."""
    for policy in transform.transforms:
        for op in getattr(policy, "ops", ()):
            if op.name.startswith("Posterize"):
                op.level_fn = partial(_at_least_a_bit, op.level_fn)


def _at_least_a_bit(level_fn: Any, level: float, hparams: Any) -> tuple[int]:
    (bits,) = level_fn(level, hparams)
    return (max(1, bits),)


class Mix:
    """Collate images [N, 3, S, S] and targets [N, classes], mixed in groups of `mix_batch`.

    A group draws from its first image's key, so that neither the number of ranks nor the size of
    a micro-batch changes what is mixed with what.
    """

    def __init__(self, args: argparse.Namespace, classes: int) -> None:
        self.seed, self.classes, self.smoothing = args.seed, classes, args.label_smoothing
        self.size = min(args.mix_batch, args.micro_batch)
        self.mixup = None
        if args.mixup or args.cutmix:
            if self.size % 2 or args.micro_batch % self.size:
                raise UsageError(
                    "--mix-batch must be even and divide --micro-batch, "
                    f"{args.micro_batch}, got {self.size}"
                )
            self.mixup = Mixup(
                args.mixup, args.cutmix, label_smoothing=self.smoothing, num_classes=classes
            )

    def __call__(self, samples: list[tuple[Key, Any]]) -> tuple[Tensor, Tensor]:
        keys = [key for key, _ in samples]
        x, y = default_collate([item for _, item in samples])
        if self.mixup is None:
            return x, mixup_target(y, self.classes, 1.0, self.smoothing)
        parts = []
        for i in range(0, len(x), self.size):
            seed_all(self.seed, *keys[i], 2)
            parts.append(self.mixup(x[i : i + self.size], y[i : i + self.size]))
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    logits = model(x)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return soft_cross_entropy(logits, y.to(logits.dtype))


def train(
    args: argparse.Namespace,
    ranks: Ranks,
    model: nn.Module,
    data: tuple[Any, Any, int],
    loss: Callable[[nn.Module, Any], Tensor] = cross_entropy,
) -> dict[str, Any]:
    """Train a classifier with AdamW and a cosine schedule; what a script adds is in `loss`."""
    train_images, val_images, classes = data
    precision = loop.DTYPES[args.dtype]

    def cast(x: Tensor) -> Tensor:
        return x.to(precision, memory_format=torch.channels_last)

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return create_optimizer_v2(
            model,
            opt="adamw",
            lr=args.lr,
            betas=(0.9, 0.999),
            weight_decay=args.weight_decay,
            layer_decay=None if args.layer_decay == 1 else args.layer_decay,
        )

    def schedule(optimizer: torch.optim.Optimizer, plan: Plan) -> CosineLRScheduler:
        warmup = args.warmup_epochs * plan.steps_per_epoch
        return CosineLRScheduler(
            optimizer,
            t_initial=max(1, args.epochs * plan.steps_per_epoch - warmup),
            lr_min=1e-6,
            warmup_t=warmup,
            warmup_prefix=True,
            t_in_epochs=False,
        )

    def evaluate(model: nn.Module) -> dict[str, float]:
        share = Share(val_images, ranks)
        loader = DataLoader(share, batch_size=args.micro_batch, num_workers=args.workers)
        counts = torch.zeros(3, dtype=torch.float64)  # right, right among five, all
        for (x, y), real in loader:
            ranked = model(cast(x.to(ranks.device))).topk(min(5, classes)).indices.cpu()
            right = (ranked == y[:, None]) & real[:, None]
            counts += torch.stack([right[:, 0].sum(), right.sum(), real.sum()])
        top1, top5, images = ranks.sum(counts).tolist()
        return {"top1": top1 / images, "top5": top5 / images}

    return loop.train(
        args,
        ranks,
        loop.Task(
            model=model,
            optimizer=optimizer,
            schedule=schedule,
            dataset=train_images,
            collate=Mix(args, classes),
            loss=lambda model, batch: loss(model, (cast(batch[0]), batch[1])),
            evaluate=evaluate,
            steps=lambda plan: args.epochs * plan.steps_per_epoch,
        ),
    )


def build(args: argparse.Namespace, classes: int) -> nn.Module:
    """The model of --model, initialised from --seed alone."""
    torch.manual_seed(args.seed)
    try:
        return create_model(
            args.model, classes, drop_path_rate=args.drop_path, recompute=args.recompute
        )
    except ValueError as error:
        raise UsageError(f"--model: {error}") from error
