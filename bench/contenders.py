"""Who takes part: our backends, eager and torch.compile in both layouts, zentorch, and others.

A contender prepares a cell's work or says why it does not (SkipError). What it gives back is a call
to time and the results to check (calls.py). Runtimes other than torch are in runtimes.py, timm's
ConvNeXt in convnext.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from bench import convnext, runtimes
from bench.calls import run_torch
from bench.runtimes import Prepared, SkipError
from bench.work import Work
from convnest_kernels import _extension, backends

REFERENCE = "eager-nhwc"  # ratios are to it


@dataclass(frozen=True)
class Contender:
    """`prepare` builds it for work, or raises SkipError; `ours` are held to the tests' bound."""

    name: str
    prepare: Callable[[Work], Prepared]
    ours: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    by_default: bool = True
    compiles: bool = False  # and its compiler keeps what it made on disk


def _ours(backend: str) -> Callable[[Work], Prepared]:
    def prepare(work: Work) -> Prepared:
        device = work.cell.device
        if (backend == "cpu") != (device == "cpu"):
            raise SkipError(f"the backend is not for {device} tensors")
        if backend == "cpu" and _extension.module is None:
            raise SkipError(f"the native module is not built: {_extension.error}")
        prepared = run_torch(work, "ours", work.make_ours(backend))
        assert prepared.forward is not None
        try:
            # Not the call: a training step would move the parameters before they are checked.
            with torch.no_grad():
                prepared.forward()
        except backends.BackendError as error:
            raise SkipError(str(error).splitlines()[0]) from error
        return prepared

    return prepare


def _eager(form: str) -> Callable[[Work], Prepared]:
    return lambda work: run_torch(work, form, work.forms[form])


def _depthwise_by(kernel: str) -> Callable[[Work], Prepared]:
    """Depthwise convolutions by "cudnn", or by PyTorch's own "native" kernels."""

    def prepare(work: Work) -> Prepared:
        if work.cell.device != "cuda":
            raise SkipError("cuDNN is for GPUs")
        flags: Any = torch.backends.cudnn.flags
        if "depthwise_kernel" in inspect.signature(flags).parameters:
            chosen = {"enabled": True, "depthwise_kernel": kernel}
        elif kernel == "native":
            chosen = {"enabled": False}  # every convolution then
        else:
            raise SkipError(f"torch {torch.__version__} has no choice of cuDNN's depthwise kernels")
        return run_torch(work, "nhwc", work.forms["nhwc"], scope=lambda: flags(**chosen))

    return prepare


def _compiled(form: str, mode: str | None = None) -> Callable[[Work], Prepared]:
    def prepare(work: Work) -> Prepared:
        compiled = torch.compile(work.forms[form], mode=mode, dynamic=False)
        return _run_compiled(work, form, compiled)

    return prepare


def _run_compiled(work: Work, form: str, compiled: Any) -> Prepared:
    """Compile by a first call, with frozen weights in inference."""
    import torch._inductor.config as inductor

    prepared = run_torch(work, form, work.forms[form], compiled)
    with ExitStack() as scope:
        if work.cell.mode == "infer":
            # Freezing is looked at when the first call compiles, and asks for no_grad.
            scope.enter_context(inductor.patch(freezing=True))
        prepared.results()
    return prepared


def _zentorch(work: Work) -> Prepared:
    """AMD's plug-in, as a backend of torch.compile: it takes over the linear layers."""
    if work.cell.mode == "train":
        raise SkipError("it does not train")
    runtimes.import_zentorch()
    compiled = torch.compile(work.forms["nhwc"], backend="zentorch", dynamic=False)
    return _run_compiled(work, "nhwc", compiled)


CPU, GPU = ("cpu",), ("cuda",)
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("cpu", _ours("cpu"), True, CPU),
        Contender("cuda", _ours("cuda"), True, GPU),
        Contender("triton", _ours("triton"), True, GPU),
        Contender("eager-nhwc", _eager("nhwc")),
        Contender("eager-nchw", _eager("nchw")),
        Contender("cudnn-depthwise", _depthwise_by("cudnn"), devices=GPU),
        Contender("native-depthwise", _depthwise_by("native"), devices=GPU),
        Contender("compile-nhwc", _compiled("nhwc"), compiles=True),
        Contender("compile-nchw", _compiled("nchw"), compiles=True),
        # It compiles for minutes on a GPU. On a CPU it tunes the products of linear layers, which
        # only the NHWC form has.
        Contender(
            "compile-max-autotune",
            _compiled("nhwc", "max-autotune"),
            by_default=False,
            compiles=True,
        ),
        Contender("onnxruntime", runtimes.onnxruntime, devices=CPU),
        Contender("openvino", runtimes.openvino, devices=CPU),
        Contender("timm-half", convnext.timm_half),
        Contender("large-kernel-extension", convnext.large_kernel_half, devices=GPU),
        Contender("convnext-eager", convnext.network("convnext", compiled=False)),
        Contender("convnext-compile", convnext.network("convnext", compiled=True), compiles=True),
        # Last to be prepared: its import changes what torch.compile does.
        Contender("zentorch", _zentorch, devices=CPU, compiles=True),
    )
}


def default_for(device: str) -> list[str]:
    """The contenders of a device, but for those that are slow to prepare."""
    return [c.name for c in CONTENDERS.values() if device in c.devices and c.by_default]
