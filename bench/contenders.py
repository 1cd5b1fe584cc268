"""The contenders that torch runs: our backends, eager and torch.compile in both layouts, timm.

A contender prepares a cell's work or says why it does not (SkipError). What it gives back is a call
to time and the results to check. Runtimes other than torch are in runtimes.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench import runtimes, verify
from bench.cells import NETWORKS
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


def copies_for(device: str) -> int:
    """Copies of the inputs that calls take in turn: on a GPU none is left in a cache."""
    return 3 if device == "cuda" else 1


def run_torch(
    work: Work, form: str, module: nn.Module, function: Any = None, **scope: Any
) -> Prepared:
    """A torch module (called through `function`, where it is compiled) as a contender."""
    function = module if function is None else function
    if work.step is not None:
        return _run_steps(work, form, module, function, **scope)
    first, *others = (
        _run_on(work, work.inputs_for(form), module, function)
        for _ in range(copies_for(work.cell.device))
    )
    return Prepared(
        first.call,
        first.results,
        module,
        first.forward,
        others=tuple(other.call for other in others),
        **scope,
    )


def _run_on(work: Work, inputs: tuple[Tensor, ...], module: nn.Module, function: Any) -> Prepared:
    def forward() -> Tensor:
        return function(*inputs)

    if work.cell.mode == "infer":

        def infer() -> Tensor:
            with torch.no_grad():
                return forward()

        return Prepared(infer, lambda: {"output": infer()}, module, forward)

    parameters = dict(module.named_parameters())
    wanted = [*inputs, *parameters.values()]
    names = [f"dinput{i}" for i in range(len(inputs))] + [f"d{name}" for name in parameters]

    def train() -> tuple[Tensor, tuple[Tensor, ...]]:
        y = forward()
        return y, torch.autograd.grad(y, wanted, work.dy)

    def results() -> dict[str, Tensor]:
        y, grads = train()
        return {"output": y.detach(), **dict(zip(names, grads, strict=True))}

    return Prepared(train, results, module, forward)


def _run_steps(work: Work, form: str, module: nn.Module, function: Any, **scope: Any) -> Prepared:
    """Whole training steps are timed; logits and gradients before the first one are checked."""
    assert work.step is not None
    inputs = work.inputs_for(form)
    parameters = dict(module.named_parameters())

    def forward() -> Tensor:
        return function(*inputs)

    def results() -> dict[str, Tensor]:
        y = forward()
        grads = torch.autograd.grad(verify.objective(work, y, 0), list(parameters.values()))
        names = [f"d{name}" for name in parameters]
        return {"output": y.detach(), **dict(zip(names, grads, strict=True))}

    return Prepared(work.step(function, inputs), results, module, forward, **scope)


def _ours(backend: str) -> Callable[[Work], Prepared]:
    def prepare(work: Work) -> Prepared:
        device = work.cell.device
        if (backend == "cpu") != (device == "cpu"):
            raise SkipError(f"the backend is not for {device} tensors")
        if backend == "cpu" and _extension.module is None:
            raise SkipError(f"the native module is not built: {_extension.error}")
        prepared = run_torch(work, "ours", work.make_ours(backend))
        try:
            prepared.call()
        except backends.BackendError as error:
            raise SkipError(str(error).splitlines()[0]) from error
        return prepared

    return prepare


def _eager(form: str) -> Callable[[Work], Prepared]:
    return lambda work: run_torch(work, form, work.forms[form])


def _cudnn(depthwise_kernel: bool) -> Callable[[Work], Prepared]:
    """Depthwise convolutions by cuDNN, or by PyTorch's own kernels."""

    def prepare(work: Work) -> Prepared:
        if work.cell.device != "cuda":
            raise SkipError("cuDNN is for GPUs")
        import inspect

        flags: Any = torch.backends.cudnn.flags
        if not depthwise_kernel:
            scope = {"scope": lambda: flags(enabled=False)}
        elif "depthwise_kernel" in inspect.signature(flags).parameters:
            scope = {"scope": lambda: flags(enabled=True, depthwise_kernel="cudnn")}
        else:
            raise SkipError(f"torch {torch.__version__} has no choice of cuDNN's depthwise kernels")
        return run_torch(work, "nhwc", work.forms["nhwc"], **scope)

    return prepare


def _compiled(form: str, mode: str | None = None) -> Callable[[Work], Prepared]:
    def prepare(work: Work) -> Prepared:
        import torch._inductor.config as inductor

        module = work.forms[form]
        compiled = torch.compile(module, mode=mode, dynamic=False)
        prepared = run_torch(work, form, module, compiled)
        with ExitStack() as scope:
            if work.cell.mode == "infer":
                # Freezing is looked at when the first call compiles, and asks for no_grad.
                scope.enter_context(inductor.patch(freezing=True))
            prepared.results()
        return prepared

    return prepare


def _timm_half(work: Work) -> Prepared:
    """The convolution and norm of timm's own ConvNeXt block, without GELU: its own formula."""
    if work.cell.subject != "dwconv_gelu_layernorm":
        raise SkipError("it is the convolution and norm of a ConvNeXt block")
    if work.cell.mode == "train" or importlib.util.find_spec("timm") is None:
        raise SkipError("timm is not installed" if work.cell.mode == "infer" else "inference only")
    from timm.models.convnext import ConvNeXtBlock

    ours = work.forms["nhwc"]
    block = ConvNeXtBlock(work.inputs[0].shape[1], mlp_ratio=1, conv_mlp=False)
    with torch.no_grad():
        block.conv_dw.weight.copy_(ours.conv_weight)
        block.conv_dw.bias.copy_(ours.conv_bias)
        block.norm.weight.copy_(ours.ln_weight)
        block.norm.bias.copy_(ours.ln_bias)
    half = _TimmHalf(block).to(work.inputs[0])
    return run_torch(work, "nhwc", half)


class _TimmHalf(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.conv_dw, self.norm = block.conv_dw, block.norm

    def forward(self, x: Tensor) -> Tensor:
        # GELU between them, so that it is the operator's formula with timm's modules.
        y = nn.functional.gelu(self.conv_dw(x)).permute(0, 2, 3, 1)
        return self.norm(y).permute(0, 3, 1, 2)


def _large_kernel_extension(work: Work) -> Prepared:
    if importlib.util.find_spec("depthwise_conv2d_implicit_gemm") is None:
        raise SkipError(
            "depthwise_conv2d_implicit_gemm (RepLKNet's CUDA extension) is not installed"
        )
    if work.cell.subject != "dwconv_gelu_layernorm" or work.cell.device != "cuda":
        raise SkipError("it replaces the convolution of dwconv_gelu_layernorm on a GPU")
    from depthwise_conv2d_implicit_gemm import DepthWiseConv2dImplicitGEMM

    module = _timm_half_with(DepthWiseConv2dImplicitGEMM, work)
    return run_torch(work, "nchw", module)


def _timm_half_with(convolution: Any, work: Work) -> nn.Module:
    ours = work.forms["nhwc"]
    channels, kernel = work.inputs[0].shape[1], ours.conv_weight.shape[-1]
    half = _TimmHalf.__new__(_TimmHalf)
    nn.Module.__init__(half)
    half.conv_dw = convolution(channels, kernel, bias=True)
    half.norm = nn.LayerNorm(channels, eps=1e-6)
    half.to(work.inputs[0])
    half.load_state_dict(
        {
            "conv_dw.weight": ours.conv_weight,
            "conv_dw.bias": ours.conv_bias,
            "norm.weight": ours.ln_weight,
            "norm.bias": ours.ln_bias,
        }
    )
    return half


def _baseline(name: str, compiled: bool) -> Callable[[Work], Prepared]:
    """A network of its own: the same job done by another architecture."""

    def prepare(work: Work) -> Prepared:
        if name not in work.baselines:
            raise SkipError("it is a whole network")
        try:
            module = work.baselines[name]()
        except ImportError as error:
            raise SkipError(str(error)) from error
        function = torch.compile(module, dynamic=False) if compiled else None
        prepared = run_torch(work, "nhwc", module, function)
        prepared.checked_by_itself, prepared.is_compiled = True, compiled
        return prepared

    return prepare


CPU, GPU = ("cpu",), ("cuda",)
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("cpu", _ours("cpu"), True, CPU),
        Contender("cuda", _ours("cuda"), True, GPU),
        Contender("triton", _ours("triton"), True, GPU),
        Contender("eager-nhwc", _eager("nhwc")),
        Contender("eager-nchw", _eager("nchw")),
        Contender("cudnn-depthwise", _cudnn(True), devices=GPU),
        Contender("native-depthwise", _cudnn(False), devices=GPU),
        Contender("compile-nhwc", _compiled("nhwc")),
        Contender("compile-nchw", _compiled("nchw")),
        # It compiles for minutes.
        Contender("compile-max-autotune", _compiled("nchw", "max-autotune"), by_default=False),
        Contender("onnxruntime", runtimes.onnxruntime, devices=CPU),
        Contender("openvino", runtimes.openvino, devices=CPU),
        Contender("zentorch", runtimes.zentorch, devices=CPU),
        Contender("timm-half", _timm_half),
        Contender("large-kernel-extension", _large_kernel_extension, devices=GPU),
        Contender("convnext-eager", _baseline("convnext", compiled=False)),
        Contender("convnext-compile", _baseline("convnext", compiled=True)),
    )
}


def default_for(device: str, subject: str = "block") -> list[str]:
    """The contenders of a device; max-autotune on a GPU only, and not for whole networks."""
    return [
        contender.name
        for contender in CONTENDERS.values()
        if device in contender.devices
        and (contender.by_default or (device == "cuda" and subject not in NETWORKS))
    ]
