"""Arguments and exit status of `python -m convnest_kernels train`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from convnest_kernels import backends, models
from convnest_kernels.train.config import (
    DIGITS,
    MINI,
    RECOMPUTE,
    Config,
    default_image_size,
    use_device,
)
from convnest_kernels.train.errors import TrainError, need

HELP = "train a ConvNeSt on real images and compare it with eager PyTorch"
DESCRIPTION = (
    "Train a ConvNeSt: by default a small one on scikit-learn's handwritten digits, in about a "
    "minute on two CPU cores. At the end speed, memory and accuracy are set beside those of eager "
    "PyTorch. Ctrl-C saves; --resume goes on, on the CPU with the same bits."
)

_OUTPUT = "runs"
_NEWEST = "newest"  # what a bare --resume stands for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Config()
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="a folder of class folders of images, with train/ and val/ or split 4:1; "
        f"default: {DIGITS}, the handwritten ones that come with scikit-learn",
    )
    parser.add_argument(
        "--model", help=f"{MINI} (the default) or one of {', '.join(models.list_models())}"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="default: 32 for the digits; for folders 64 with the small model, else 224",
    )
    parser.add_argument(
        "--backend",
        choices=("auto", *backends.BACKENDS),
        help="of our operators; default: CONVNEST_BACKEND, else auto",
    )
    parser.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="bfloat16 autocast",
    )
    for name, kind, what in (
        ("epochs", int, ""),
        ("batch_size", int, ""),
        ("lr", float, "peak learning rate of AdamW; "),
        ("weight_decay", float, ""),
        ("drop_path", float, "stochastic depth of the last block; "),
        ("seed", int, "of weights, order and augmentation; "),
        ("workers", int, "processes that decode images; "),
    ):
        option = f"--{name.replace('_', '-')}"
        help = f"{what}default: {getattr(default, name)}"
        parser.add_argument(option, type=kind, metavar=kind.__name__.upper(), help=help)
    parser.add_argument(
        "--recompute", choices=RECOMPUTE, help="what backward computes again to save memory"
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"default: {_OUTPUT}/MODEL-DATA")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=_NEWEST,
        metavar="PATH",
        help="go on from this checkpoint, or from the one in --output; options that are not given "
        "are the checkpoint's",
    )
    parser.add_argument("--no-compare", action="store_true", help="leave eager out")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on stdout; the rest goes to stderr"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; 0, 1 (failure), 2 (usage) or 128 + signal."""
    try:
        result = _run(args)
    except TrainError as error:
        stopped = error.exit_code > 128
        print(error if stopped else f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # outside of training, which has a handler of its own
        print("Stopped; what was saved before is intact.", file=sys.stderr)
        return 128 + signal.SIGINT
    if args.json:
        print(json.dumps(result))
    return 0


def _run(args: argparse.Namespace) -> dict[str, Any]:
    need("rich", "rich", "training")
    need("safetensors.torch", "safetensors", "training")
    from convnest_kernels.train import session
    from convnest_kernels.train.display import Display

    given = _given(args)
    output = args.output or Path(_OUTPUT) / _default_name(given)
    saved = None
    if args.resume is not None:
        path = output / session.LAST if args.resume == _NEWEST else Path(args.resume)
        path = path / session.LAST if path.is_dir() else path
        saved = session.read_saved(path)
        output = args.output or path.parent
        config = session.continue_config(saved, given)
    else:
        data, model = given.get("data", DIGITS), given.get("model", MINI)
        defaults = {"device": _default_device(), "image_size": default_image_size(data, model)}
        config = Config(**{**defaults, **given})
    use_device(config.device)
    display = Display(json=args.json)
    return session.Session(config, output, display, saved).run(not args.no_compare)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were on the command line."""
    names = [field.name for field in dataclasses.fields(Config)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if given.get("data", DIGITS) != DIGITS:
        given["data"] = str(Path(given["data"]).resolve())
    return given


def _default_name(given: dict[str, Any]) -> str:
    return f"{given.get('model', MINI)}-{Path(given.get('data', DIGITS)).name}"


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
