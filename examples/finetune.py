"""Fine-tune a trained ConvNeSt at 384 x 384, or on other classes.

    torchrun --nproc-per-node 8 examples/finetune.py --model convnest_base \
        --weights runs/base/ema.safetensors --data imagenet/ --output runs/base384 --dtype bfloat16

The head is drawn anew where --data has another number of classes than --weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagenet import set_recipe
from recipe import classify, loop, parallel, state


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    # ConvNeXt's fine-tuning from ImageNet-1K to 384: no mixing, hardly any weight decay.
    parser = classify.parser(
        __doc__,
        batch=512,
        micro_batch=32,
        lr=5e-5,
        weight_decay=1e-8,
        layer_decay=0.7,
        epochs=30,
        warmup_epochs=0,
        image_size=384,
        crop_pct=1.0,
        mixup=0.0,
        cutmix=0.0,
    )
    parser.add_argument("--weights", type=Path, required=True, help="a .safetensors file")
    args = parser.parse_args(arguments)
    set_recipe(args)
    with parallel.joined(args.device) as ranks:
        data = classify.open_folder(args)
        model = classify.build(args, data[2])
        fresh = state.load_weights(args.weights, model)
        if fresh and ranks.first:
            print(f"Drawn anew for {data[2]} classes: {', '.join(fresh)}")
        return classify.train(args, ranks, model, data)


if __name__ == "__main__":
    loop.run(main)
