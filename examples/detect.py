"""Object detection: torchvision's Mask R-CNN on a ConvNeSt, on a COCO-format data set.

    torchrun --nproc-per-node 8 examples/detect.py --model convnest_tiny \
        --weights runs/tiny/ema.safetensors --data coco/ --output runs/coco --dtype bfloat16

--data holds train2017/ and val2017/ with images, and annotations/instances_{train,val}2017.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval
from timm.scheduler import MultiStepLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection import MaskRCNN
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms import v2

from convnest_kernels.train.errors import UsageError
from recipe import dense, loop, parallel
from recipe.batches import Key, Plan
from recipe.parallel import Ranks, Share

# After which epochs the learning rate falls to a tenth, in runs of 12 and of 36.
MILESTONES = {12: (8, 11), 36: (27, 33)}


class Pyramid(nn.Module):
    """A ConvNeSt and the feature pyramid that Mask R-CNN takes its maps from."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.backbone = dense.Backbone(args)
        self.out_channels = args.channels
        self.fpn = FeaturePyramidNetwork(
            self.backbone.channels, args.channels, extra_blocks=LastLevelMaxPool()
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.backbone(x)
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))


class Objects(CocoDetection):
    """torchvision's COCO data set without crowds, which are no objects to learn."""

    def _load_target(self, id: int) -> list[Any]:
        return [a for a in super()._load_target(id) if not a.get("iscrowd")]


def open_coco(args: argparse.Namespace, split: str, train: bool) -> tuple[Any, Any]:
    """A data set of (image, target) and COCO's own index of it; training images have objects."""
    path = args.data / "annotations" / f"instances_{split}.json"
    if not path.is_file():
        raise UsageError(f"--data must hold {path}")
    flip = [v2.RandomHorizontalFlip()] if train else []
    to_input = [v2.ToImage(), *flip, v2.ToDtype(torch.float32, scale=True)]
    if train:
        to_input.append(v2.SanitizeBoundingBoxes())
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it reads
        images = Objects(
            str(args.data / split), str(path), transforms=v2.Compose([*to_input, v2.ToPureTensor()])
        )
    coco = images.coco
    keys = ("boxes", "labels", "masks", "image_id")
    dataset: Any = wrap_dataset_for_transforms_v2(images, target_keys=keys)
    if train:
        learned = {a["image_id"] for a in coco.anns.values() if not a.get("iscrowd")}
        dataset = Subset(dataset, [i for i, key in enumerate(images.ids) if key in learned])
    return dataset, coco


def collate(samples: list[tuple[Key, Any]]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    images, targets = zip(*(item for _, item in samples), strict=True)
    return list(images), list(targets)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = dense.parser(__doc__, batch=16, micro_batch=2, lr=1e-4, workers=4)
    add = parser.add_argument
    add("--epochs", type=int, choices=sorted(MILESTONES), default=12)
    add("--warmup-steps", type=int, default=500)
    add("--min-sizes", type=int, nargs="+", default=list(range(480, 801, 32)))
    add("--max-size", type=int, default=1333, help="of the longer side")
    add("--channels", type=int, default=256, help="of the feature pyramid")
    args = parser.parse_args(arguments)
    if args.parallel == "fsdp":
        # Under its policy images and anchors would be bfloat16, which has 8 bits for a coordinate.
        raise UsageError("--parallel must be ddp for detection")
    with parallel.joined(args.device) as ranks:
        return train(args, ranks)


def train(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    train_set, train_coco = open_coco(args, "train2017", train=True)
    val_set, val_coco = open_coco(args, "val2017", train=False)
    pyramid = Pyramid(args)
    model = MaskRCNN(
        pyramid,
        num_classes=max(train_coco.cats) + 1,  # categories keep their numbers; 0 is background
        min_size=args.min_sizes,
        max_size=args.max_size,
    )
    precision = loop.DTYPES[args.dtype]

    def schedule(optimizer: torch.optim.Optimizer, plan: Plan) -> MultiStepLRScheduler:
        return MultiStepLRScheduler(
            optimizer,
            # timm decays at the index before a milestone, and our steps count from 1.
            decay_t=[2 + epoch * plan.steps_per_epoch for epoch in MILESTONES[args.epochs]],
            decay_rate=0.1,
            warmup_t=args.warmup_steps,
            warmup_prefix=False,
            t_in_epochs=False,
        )

    def loss(model: nn.Module, batch: Any) -> Tensor:
        images, targets = batch
        for target in targets:
            target["boxes"] = target["boxes"].to(precision)
        return sum(model([x.to(precision) for x in images], targets).values())

    def evaluate(model: nn.Module) -> dict[str, float]:
        """COCO's average precision of boxes and masks."""
        loader = DataLoader(Share(val_set, ranks), batch_size=None, num_workers=args.workers)
        found = []
        for (image, target), real in loader:
            (result,) = model([image.to(ranks.device, precision)])
            if real:
                found += to_coco(target["image_id"], result)
        found = ranks.gather(found)
        return average_precision(val_coco, found)

    return loop.train(
        args,
        ranks,
        loop.Task(
            model=model,
            optimizer=lambda model: dense.optimizer(model, pyramid.backbone, args),
            schedule=schedule,
            dataset=train_set,
            collate=collate,
            loss=loss,
            evaluate=evaluate,
            steps=lambda plan: args.epochs * plan.steps_per_epoch,
        ),
    )


def to_coco(image_id: int, result: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Mask R-CNN's result for one image as COCO's list of results."""
    boxes = result["boxes"].double().cpu()
    boxes[:, 2:] -= boxes[:, :2]
    masks = (result["masks"][:, 0] > 0.5).to(torch.uint8).cpu().numpy()
    return [
        {
            "image_id": image_id,
            "category_id": label,
            "score": score,
            "bbox": box,
            "segmentation": coco_mask.encode(np.asfortranarray(mask)),
        }
        for box, label, score, mask in zip(
            boxes.tolist(), result["labels"].tolist(), result["scores"].tolist(), masks, strict=True
        )
    ]


def average_precision(coco: Any, found: list[dict[str, Any]]) -> dict[str, float]:
    figures = {"box_ap": 0.0, "mask_ap": 0.0}
    if not found:
        return figures
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its tables
        results = coco.loadRes(found)
        for name, kind in (("box_ap", "bbox"), ("mask_ap", "segm")):
            evaluation = COCOeval(coco, results, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            figures[name] = float(evaluation.stats[0])
    return figures


if __name__ == "__main__":
    loop.run(main)
