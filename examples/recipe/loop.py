"""The training loop of every script: accumulation, schedule, EMA, checkpoints, stopping."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from convnest_kernels.train.errors import TrainError
from convnest_kernels.train.signals import StopRequest
from recipe import parallel, state
from recipe.batches import Key, Plan, micro_batches, seed_all, to_device
from recipe.parallel import Ranks

DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


@dataclass
class Task:
    """What a script brings to the loop.

    `model` is plain, and stays the owner of the parameters. `loss` gets it wrapped for training
    and a micro-batch, and gives the mean loss of it. `evaluate` gets a model in evaluation mode
    and gives figures. `schedule` sets the learning rates of a step, counted from 1.
    """

    model: nn.Module
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    schedule: Callable[[torch.optim.Optimizer, Plan], Scheduler]
    dataset: Any
    collate: Callable[[list[tuple[Key, Any]]], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    evaluate: Callable[[nn.Module], dict[str, float]]
    steps: Callable[[Plan], int]


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The arguments that all scripts have; each sets its own defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="the data set's folder")
    add("--output", type=Path, required=True, help="a folder for checkpoints and the log")
    add("--model", required=True, help="a model's name, as convnest_tiny")
    add("--batch", type=int, help="images of one optimizer step, over all ranks")
    add("--micro-batch", type=int, help="images of one forward and backward on one rank")
    add("--lr", type=float, help="peak learning rate, for --batch images")
    add("--weight-decay", type=float, default=0.05, help="of matrices and convolutions")
    add("--drop-path", type=float, help="stochastic depth of the last block")
    add("--ema", type=float, default=0.0, help="decay of the averaged weights; 0 for none")
    add("--dtype", choices=DTYPES, default="float32", help="of activations")
    add("--recompute", choices=("none", "conv", "all"), default="none", help="to save memory")
    add("--parallel", choices=("ddp", "fsdp"), default="ddp", help="how ranks share the work")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--workers", type=int, default=8, help="processes that load images, for each rank")
    add("--seed", type=int, default=0, help="of everything random")
    add("--save-every", type=int, default=1000, help="steps between checkpoints")
    add("--eval-every", type=int, default=1, help="epochs between evaluations; 0: only at the end")
    add("--stop-after", type=int, help="save and leave after this step, to --resume later")
    add("--resume", action="store_true", help="go on from the checkpoint in --output")
    parser.set_defaults(**defaults)
    return parser


def run(main: Callable[[], None]) -> None:
    """Call a script's main, and tell its user of what went wrong without a traceback."""
    try:
        main()
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def train(args: argparse.Namespace, ranks: Ranks, task: Task) -> dict[str, Any]:
    """Train, evaluate, save; returns the last line of the log. Raises TrainError."""
    plan = Plan(len(task.dataset), args.batch, args.micro_batch, ranks.world)
    last = task.steps(plan)
    model = task.model.to(ranks.device, DTYPES[args.dtype])
    ema = None
    if args.ema:  # copied before it is sharded, and then sharded alike
        ema = ModelEmaV3(model, args.ema)
        if args.parallel == "fsdp":
            parallel.wrap(ema.module, ranks, args.parallel, args.dtype)
    wrapped = parallel.wrap(model, ranks, args.parallel, args.dtype)
    optimizer = task.optimizer(model)
    schedule = task.schedule(optimizer, plan)
    files = state.Files(args, ranks, model, optimizer, ema)
    first = files.load(plan) if args.resume else files.begin()
    batches = micro_batches(
        task.dataset,
        plan,
        ranks,
        task.collate,
        seed=args.seed,
        first=first,
        last=last,
        workers=args.workers,
    )

    def step(number: int) -> float:
        schedule.step_update(number + 1)
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for i in range(plan.accumulate):
            batch = to_device(next(batches), ranks.device)
            # For what a model draws: stochastic depth, proposals.
            position = (ranks.rank * plan.accumulate + i) * plan.micro_batch
            seed_all(args.seed, number, position, 1)
            with parallel.syncing(wrapped, i == plan.accumulate - 1):
                with parallel.autocast(wrapped, ranks, args.dtype):
                    loss = task.loss(wrapped, batch) / plan.accumulate
                loss.backward()
            total += loss.detach()
        return total.item()

    def evaluate() -> dict[str, float]:
        figures = {}
        candidates = {"": model} if ema is None else {"": model, "ema_": ema.module}
        for prefix, candidate in candidates.items():
            candidate.eval()
            with torch.no_grad(), parallel.autocast(candidate, ranks, args.dtype):
                found = task.evaluate(candidate)
            figures.update({prefix + name: value for name, value in found.items()})
        return figures

    log = _Log(args.output / "log.jsonl", ranks, append=args.resume)
    entry: dict[str, Any] = {"step": first}
    with StopRequest() as stop:
        for number in range(first, last):
            started = time.perf_counter()
            model.train()
            loss, stopping = ranks.mean([step(number), float(stop.signal is not None)])
            done = number + 1
            if not math.isfinite(loss):
                raise TrainError(
                    f"the loss became {loss} in step {done}: lower --lr ({args.lr:g}); "
                    f"{files.last} holds the last checkpoint"
                )
            optimizer.step()
            if ema is not None:
                ema.update(model)
            entry = {"step": done, "loss": loss, "lr": max(g["lr"] for g in optimizer.param_groups)}
            epoch, rest = divmod(done, plan.steps_per_epoch)
            if done == last or (args.eval_every and not rest and epoch % args.eval_every == 0):
                entry.update(evaluate())
            log.write({**entry, "seconds": round(time.perf_counter() - started, 3)})
            stops = stopping > 0 or done == args.stop_after
            if done == last or stops or done % args.save_every == 0:
                files.save(done, plan)
            if stops and done < last:
                log.say(f"Stopped after step {done} of {last}; --resume goes on.")
                return entry
    files.save_weights()
    return entry


class _Log:
    """The first rank's lines, on the screen and one JSON object each in a file."""

    def __init__(self, path: Path, ranks: Ranks, append: bool) -> None:
        self.path, self.first = path, ranks.first
        if self.first and not append:
            path.write_text("")

    def write(self, entry: dict[str, Any]) -> None:
        if self.first:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            self.say("  ".join(f"{k} {v:.6g}" for k, v in entry.items()))

    def say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)
