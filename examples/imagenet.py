"""Train a ConvNeSt on ImageNet from scratch, as in the paper's Tables 9 and 10.

    torchrun --nproc-per-node 8 examples/imagenet.py --model convnest_tiny \
        --data imagenet/ --output runs/tiny --dtype bfloat16

--data holds train/ and val/, a folder for each class in both. 4096 images make a step, whatever the
number of GPUs: micro-batches are accumulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from convnest_kernels.models import list_models
from convnest_kernels.train.errors import UsageError
from recipe import classify, loop, parallel


@dataclass(frozen=True)
class Recipe:
    """What differs from model to model."""

    drop_path: float
    warmup_epochs: int


# The tables' values in the order of size; README.md says which of this is our reading.
_DROP_PATH = {"tiny": 0.1, "small": 0.4, "base": 0.4}

RECIPES = {
    name: Recipe(
        drop_path=_DROP_PATH.get(name.rpartition("_")[2], 0.0),
        warmup_epochs=50 if "iso" in name else 20,
    )
    for name in list_models()
}


def set_recipe(args: Any) -> None:
    """Fill in what the command line leaves open and the model decides."""
    if args.model not in RECIPES:
        raise UsageError(f"--model must be one of {', '.join(RECIPES)}, got {args.model}")
    recipe = RECIPES[args.model]
    if args.drop_path is None:
        args.drop_path = recipe.drop_path
    if args.warmup_epochs is None:
        args.warmup_epochs = recipe.warmup_epochs


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = classify.parser(__doc__, batch=4096, micro_batch=128, lr=4e-3, ema=0.9999)
    args = parser.parse_args(arguments)
    set_recipe(args)
    with parallel.joined(args.device) as ranks:
        data = classify.open_folder(args)
        return classify.train(args, ranks, classify.build(args, data[2]), data)


if __name__ == "__main__":
    loop.run(main)
