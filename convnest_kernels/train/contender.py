"""One contender of the closing comparison, in a process of its own so that its memory is its own.

Its argument is {"config": ..., "steps": ...}; it writes JSON lines to stdout: {"step": i} as it
trains, then {"result": ...}. It validates if the steps are the whole run.
"""

from __future__ import annotations

import json
import statistics
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convnest_kernels.train.config import Config, use_device
from convnest_kernels.train.data import open_data, train_batches
from convnest_kernels.train.errors import TrainError
from convnest_kernels.train.loop import Step, Trainer

WARM_UP_STEPS = 5


def measure(config: Config, steps: int) -> dict[str, Any]:
    """Train for `steps` and return speed, memory and, after the whole run, accuracy.

    images_per_second: median over the full batches after warm-up, of training steps alone (without
    loading). peak_memory: of the process, or of the GPU's allocator; training_memory: how far it
    rises above what was held before the first step. kept_for_backward: bytes, see
    `kept_for_backward`.
    """
    trainer = Trainer(config, open_data(config))
    is_cuda = torch.device(config.device).type == "cuda"
    kept = kept_for_backward(trainer)
    before = torch.cuda.memory_allocated() if is_cuda else _memory("VmRSS")
    _forget_peak(is_cuda)
    seconds: list[float] = []

    def on_step(step: Step) -> bool:
        if step.images == config.batch_size or not seconds:
            seconds.append(step.seconds / step.images)
        _tell({"step": done + trainer.progress.step})
        return done + trainer.progress.step < steps

    done = 0
    accuracy = None
    while done < steps and trainer.train_epoch(on_step):
        accuracy = trainer.validate()
        assert accuracy is not None
        trainer.finish_epoch(accuracy)
        done += trainer.steps_per_epoch
    is_whole = steps == config.epochs * trainer.steps_per_epoch
    if is_whole:
        accuracy = trainer.validate()
    peak = torch.cuda.max_memory_allocated() if is_cuda else _memory("VmHWM")
    measured = seconds[min(WARM_UP_STEPS, len(seconds) // 2) :]
    return {
        "images_per_second": 1 / statistics.median(measured),
        "steps": steps,
        "peak_memory": peak,
        "training_memory": None if peak is None or before is None else peak - before,
        "kept_for_backward": kept,
        "accuracy": accuracy if is_whole else None,
    }


def kept_for_backward(trainer: Trainer) -> int:
    """Bytes of the tensors that autograd keeps between forward and backward of one batch.

    Each storage counts once; parameters do not count.
    """
    parameters = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, y = next(train_batches(trainer.config, trainer.data, 0, 0))
    trainer.model.train()
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = trainer.loss(x, y)
    del loss  # lived until here, so that no two tensors were at one address
    return sum(storages.values())


def _memory(field: str) -> int | None:
    """VmRSS (now) or VmHWM (peak) of this process in bytes; None where there is no /proc.

    Not getrusage: a child's ru_maxrss starts at its parent's.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def _forget_peak(is_cuda: bool) -> None:
    """Start the peak anew, so that importing and loading do not count as training."""
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _tell(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def main() -> int:
    request = json.loads(sys.argv[1])
    try:
        config = Config(**request["config"])
        use_device(config.device)
        _tell({"result": measure(config, request["steps"])})
    except TrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
