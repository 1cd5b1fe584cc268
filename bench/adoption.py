"""Whole models of other libraries, before and after `accelerate`: time, and bytes for backward.

    python -m bench.adoption                   # timm's and torchvision's convnext_tiny; on a GPU,
                                               # where there is one
    python -m bench.adoption --matmul          # the linear layers of ConvNeXt-T alone

Each repetition times the model as it is and then accelerated (A B A B ...), on one process, after a
warm-up and a check that both give the same logits and gradients; the figures are medians, and the
ratio is the median of the ratios of the pairs. Weights are random.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnest_kernels import accelerate
from convnest_kernels.adopt import matmul

SIZE = 224


def build(library: str) -> nn.Module:
    torch.manual_seed(0)
    if library == "timm":
        import timm

        return timm.create_model("convnext_tiny", ls_init_value=0.1)
    from torchvision.models import convnext_tiny

    # Both libraries without stochastic depth, so that both models do the same.
    return convnext_tiny(layer_scale=0.1, stochastic_depth_prob=0.0)


def seconds(function: Callable[[], object]) -> float:
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """For what a GPU, if there is one, was given to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(
    a: Callable[[], object], b: Callable[[], object], repeats: int
) -> tuple[float, float, float]:
    """Median seconds of a and of b, and the median of their ratio pair by pair."""
    a(), b()
    pairs = [(seconds(a), seconds(b)) for _ in range(repeats)]
    first, second = zip(*pairs, strict=True)
    ratio = statistics.median(x / y for x, y in pairs)
    return statistics.median(first), statistics.median(second), ratio


def held(model: nn.Module, x: Tensor, amp: bool) -> int:
    """Bytes that a forward pass keeps for backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward(model, x, amp)
    del y
    return sum(kept.values())


def forward(model: nn.Module, x: Tensor, amp: bool) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        return model(x)


def train(model: nn.Module, x: Tensor, amp: bool) -> None:
    model.zero_grad(set_to_none=True)
    forward(model, x, amp).float().square().mean().backward()


def infer(model: nn.Module, x: Tensor, amp: bool) -> None:
    with torch.inference_mode():
        forward(model, x, amp)


def check(theirs: nn.Module, ours: nn.Module, x: Tensor, amp: bool) -> None:
    """Refuse to report a time of something else."""
    train(theirs, x, amp), train(ours, x, amp)
    for (name, a), (_, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        difference = ((a.grad - b.grad).norm() / a.grad.norm()).item()
        if not difference < (0.1 if amp else 1e-3):
            raise SystemExit(f"the gradients of {name} differ by {difference:.2g}: no times")


def models(
    libraries: list[str], batch: int, repeats: int, channels_last: bool, amp: bool, device: str
) -> None:
    x = torch.randn(batch, 3, SIZE, SIZE, device=device)
    where = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    print(f"convnext_tiny, {batch} images of {SIZE}², {'autocast bfloat16' if amp else 'float32'},")
    print(
        f"{'channels_last' if channels_last else 'contiguous'}, torch {torch.__version__}, "
        f"{where}, median of {repeats}\n"
    )
    print("| library | what | before | after | ratio |")
    print("|---|---|---|---|---|")
    for library in libraries:
        theirs = build(library).to(device)
        if channels_last:
            theirs, x = (thing.to(memory_format=torch.channels_last) for thing in (theirs, x))
        ours = copy.deepcopy(theirs)
        accelerate(ours, strict=True)
        check(theirs, ours, x, amp)
        for what, step in (("training step", train), ("inference", infer)):
            both = [functools.partial(step, model, x, amp) for model in (theirs, ours)]
            before, after, ratio = interleaved(*both, repeats)
            print(f"| {library} | {what} | {before:.4g} s | {after:.4g} s | {ratio:.2f}× |")
        a, b = held(theirs, x, amp), held(ours, x, amp)
        print(
            f"| {library} | kept for backward | {a / 1e6:.0f} MB | {b / 1e6:.0f} MB "
            f"| {a / b:.2f}× |",
            flush=True,
        )


Pair = tuple[Callable[[], object], Callable[[], object]]


def linear_cases(rows: int, c: int) -> dict[str, Pair]:
    """torch's and oneDNN's way, of the two linear layers of a block and of their gradients."""
    z, h = torch.randn(rows, c), torch.randn(rows, 4 * c)
    w1, w2, b1 = torch.randn(4 * c, c), torch.randn(c, 4 * c), torch.randn(4 * c)
    return {
        "y, C to 4C": (lambda: F.linear(z, w1, b1), lambda: matmul.linear(z, w1, b1)),
        "y, 4C to C": (lambda: F.linear(h, w2), lambda: matmul.linear(h, w2, None)),
        "dx, C to 4C": (lambda: h @ w1, lambda: matmul.linear(h, w1.t(), None)),
        "dx, 4C to C": (lambda: z @ w2, lambda: matmul.linear(z, w2.t(), None)),
        "dW, C to 4C": (lambda: h.t() @ z, lambda: matmul.outer(h, z)),
        "dW, 4C to C": (lambda: z.t() @ h, lambda: matmul.outer(z, h)),
    }


@torch.no_grad()
def linear_layers(batch: int, repeats: int) -> None:
    """oneDNN's and torch's own float32 linear layers, and their gradients."""
    print(f"taken on this machine: {'oneDNN' if matmul._mkl_is_slow() else 'torch'}\n")
    matmul._mkl_is_slow = lambda: True  # type: ignore[assignment]
    print("| map, channels | what | torch, GFLOP/s | oneDNN, GFLOP/s | ratio |")
    print("|---|---|---|---|---|")
    for side, c in ((56, 96), (28, 192), (14, 384), (7, 768)):
        rows = batch * side * side
        giga = 8 * rows * c * c / 1e9
        for what, (theirs, ours) in linear_cases(rows, c).items():
            before, after, ratio = interleaved(theirs, ours, repeats)
            rates = f"{giga / before:.0f} | {giga / after:.0f}"
            print(f"| {side}², {c} | {what} | {rates} | {ratio:.2f}× |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", nargs="+", default=["timm", "torchvision"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch's own choice otherwise")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=["cpu", "cuda"])
    parser.add_argument("--matmul", action="store_true", help="the linear layers alone")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.matmul:
        linear_layers(arguments.batch_size, arguments.repeats)
    else:
        models(
            arguments.library,
            arguments.batch_size,
            arguments.repeats,
            arguments.channels_last,
            arguments.amp,
            arguments.device,
        )


if __name__ == "__main__":
    main()
