"""Semantic segmentation: a ConvNeSt with a UperNet-style head, on folders of masks.

    torchrun --nproc-per-node 8 examples/segment.py --model convnest_tiny \
        --weights runs/tiny/ema.safetensors --data ADEChallengeData2016/ --output runs/ade \
        --dtype bfloat16

--data holds images/{training,validation}/*.jpg and annotations/{training,validation}/*.png. A
mask's value 0 is not learned and value k is class k - 1, as in ADE20K; --count-zero makes 0 one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.scheduler import PolyLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from convnest_kernels.train.errors import UsageError
from recipe import dense, loop, parallel
from recipe.batches import Plan
from recipe.parallel import Ranks, Share
from recipe.upernet import AuxiliaryHead, UperHead

IGNORED = 255
AUXILIARY_WEIGHT = 0.4


class Segmenter(nn.Module):
    """Logits [N, classes, H, W]; in training also those of the auxiliary head."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.backbone = dense.Backbone(args)
        channels = self.backbone.channels
        self.head = UperHead(channels, args.channels, args.classes)
        self.auxiliary = AuxiliaryHead(channels[2], args.channels // 2, args.classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        maps = self.backbone(x.contiguous(memory_format=torch.channels_last))
        auxiliary = self.auxiliary(maps[2]) if self.training else None
        return self.head(maps), auxiliary


class Masks(Dataset[Any]):
    """Images and their masks, by the name that they share."""

    def __init__(self, args: argparse.Namespace, split: str, transform: Any) -> None:
        images = args.data / "images" / split
        self.images = sorted(p for p in images.glob("*") if p.suffix in (".jpg", ".png"))
        if not self.images:
            raise UsageError(f"--data must hold images, .jpg or .png, in {images}")
        folder = args.data / "annotations" / split
        self.masks = [folder / f"{path.stem}.png" for path in self.images]
        for path in self.masks:
            if not path.is_file():
                raise UsageError(f"--data has an image without a mask: {path} is not there")
        self.transform, self.classes, self.count_zero = transform, args.classes, args.count_zero

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with Image.open(self.images[index]) as opened:
            image = tv_tensors.Image(opened.convert("RGB"))
        with Image.open(self.masks[index]) as opened:
            values = torch.from_numpy(np.array(opened)).long()
        if not self.count_zero:
            values = torch.where(values == 0, IGNORED, values - 1)
        wrong = (values >= self.classes) & (values != IGNORED)
        if wrong.any():
            raise UsageError(
                f"--classes {self.classes} is too few: {self.masks[index]} has class "
                f"{values[wrong].max()}"
            )
        return self.transform(image, tv_tensors.Mask(values))


def transforms(args: argparse.Namespace) -> tuple[Any, Any]:
    """Of training (scale 0.5 to 2, crop, flip, colours) and of validation (scale 1)."""
    size = args.image_size
    to_input = [
        v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
        v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        v2.ToPureTensor(),
    ]
    fill = {tv_tensors.Image: 127, tv_tensors.Mask: IGNORED}
    train = [
        v2.RandomResize(size // 2, 2 * size + 1),
        v2.RandomCrop(size, pad_if_needed=True, fill=fill),
        v2.RandomHorizontalFlip(),
        v2.RandomPhotometricDistort(),
    ]
    # Masks of validation keep their size: figures are counted on the pixels that were given.
    return v2.Compose([*train, *to_input]), v2.Compose(to_input)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy over all pixels of all images; pixels without a class count as 0.

    So it is a mean over images of equal weight, however they are spread over ranks.
    """
    x, masks = batch
    logits, auxiliary = model(x)

    def cross_entropy(logits: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = F.interpolate(logits, masks.shape[1:], mode="bilinear", align_corners=False)
        total = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum")
        return total / masks.numel()

    return cross_entropy(logits) + AUXILIARY_WEIGHT * cross_entropy(auxiliary)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = dense.parser(
        __doc__, batch=16, micro_batch=2, lr=1e-4, eval_every=10, workers=4, save_every=4000
    )
    add = parser.add_argument
    add("--steps", type=int, default=160_000)
    add("--warmup-steps", type=int, default=1500)
    add("--image-size", type=int, default=512, help="crop; validation scales the shorter side")
    add("--classes", type=int, default=150)
    add("--channels", type=int, default=512, help="of the head, a multiple of 64")
    add("--count-zero", action="store_true", help="a mask's value is its class, 255 is ignored")
    args = parser.parse_args(arguments)
    if args.channels % 64 or args.channels < 64:
        raise UsageError(f"--channels must be a multiple of 64, got {args.channels}")
    if args.warmup_steps > args.steps:
        raise UsageError(f"--warmup-steps must be at most --steps, got {args.warmup_steps}")
    with parallel.joined(args.device) as ranks:
        return train(args, ranks)


def train(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    train_transform, val_transform = transforms(args)
    val = Masks(args, "validation", val_transform)
    model = Segmenter(args)
    precision = loop.DTYPES[args.dtype]

    def schedule(optimizer: torch.optim.Optimizer, plan: Plan) -> PolyLRScheduler:
        return PolyLRScheduler(
            optimizer,
            t_initial=args.steps + 1 - args.warmup_steps,  # steps count from 1; none is at 0
            power=1.0,
            warmup_t=args.warmup_steps,
            warmup_prefix=True,
            t_in_epochs=False,
        )

    def evaluate(model: nn.Module) -> dict[str, float]:
        """Mean IoU and pixel accuracy over the validation images."""
        counts = torch.zeros(args.classes, args.classes, dtype=torch.float64)  # truth, found
        loader = DataLoader(Share(val, ranks), batch_size=None, num_workers=args.workers)
        for (x, mask), real in loader:
            x, scale = x[None].to(ranks.device, precision), args.image_size / min(x.shape[1:])
            size = [max(args.image_size, round(side * scale)) for side in x.shape[2:]]
            logits, _ = model(F.interpolate(x, size, mode="bilinear", align_corners=False))
            logits = F.interpolate(logits, mask.shape, mode="bilinear", align_corners=False)
            if real:
                found, known = logits[0].argmax(0).cpu(), mask != IGNORED
                pairs = mask[known] * args.classes + found[known]
                counts += torch.bincount(pairs, minlength=args.classes**2).view_as(counts)
        counts = ranks.sum(counts).cpu()
        right = counts.diag()
        union = counts.sum(0) + counts.sum(1) - right
        return {
            "miou": (right / union)[union > 0].mean().item(),
            "accuracy": (right.sum() / counts.sum()).item(),
        }

    return loop.train(
        args,
        ranks,
        loop.Task(
            model=model,
            optimizer=lambda model: dense.optimizer(model, model.backbone, args),
            schedule=schedule,
            dataset=Masks(args, "training", train_transform),
            collate=lambda samples: default_collate([item for _, item in samples]),
            loss=lambda model, batch: loss(model, (batch[0].to(precision), batch[1])),
            evaluate=evaluate,
            steps=lambda plan: args.steps,
        ),
    )


if __name__ == "__main__":
    loop.run(main)
