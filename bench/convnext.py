"""timm's ConvNeXt as a contender: the convolution and norm of its block, and whole networks."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.calls import run_torch
from bench.runtimes import Prepared, SkipError
from bench.work import Work

EXTENSION = "depthwise_conv2d_implicit_gemm"  # RepLKNet's CUDA kernels


class Half(nn.Module):
    """Somebody's depthwise convolution and LayerNorm, with the operator's parameters and names."""

    def __init__(self, work: Work, convolution: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        like = work.inputs[0]
        # In a tuple, so that parameters are registered under the operator's names alone.
        self.parts = (convolution.to(like.device, like.dtype), norm.to(like.device, like.dtype))
        for prefix, part in zip(("conv", "ln"), self.parts, strict=True):
            for name in ("weight", "bias"):
                parameter: Any = getattr(part, name)
                with torch.no_grad():
                    parameter.copy_(getattr(work.forms["nhwc"], f"{prefix}_{name}"))
                self.register_parameter(f"{prefix}_{name}", parameter)

    def forward(self, x: Tensor) -> Tensor:
        convolution, norm = self.parts
        return norm(convolution(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _channels(work: Work) -> int:
    if work.cell.subject != "convnext_half":
        raise SkipError("it is the convolution and norm of a ConvNeXt block")
    return work.inputs[0].shape[1]


def timm_half(work: Work) -> Prepared:
    """The convolution and norm of timm's own ConvNeXtBlock."""
    channels = _channels(work)
    if importlib.util.find_spec("timm") is None:
        raise SkipError("timm is not installed")
    from timm.models.convnext import ConvNeXtBlock

    block = ConvNeXtBlock(channels, mlp_ratio=1, conv_mlp=False)
    return run_torch(work, "nhwc", Half(work, block.conv_dw, block.norm))


def large_kernel_half(work: Work) -> Prepared:
    """The same with RepLKNet's CUDA extension as the convolution, which takes NCHW."""
    channels = _channels(work)
    if work.cell.device != "cuda":
        raise SkipError(f"{EXTENSION} is for GPUs")
    if importlib.util.find_spec(EXTENSION) is None:
        raise SkipError(f"{EXTENSION} (RepLKNet's CUDA extension) is not installed")
    extension = importlib.import_module(EXTENSION)
    convolution = extension.DepthWiseConv2dImplicitGEMM(channels, 7, bias=True)
    return run_torch(work, "nchw", Half(work, convolution, nn.LayerNorm(channels, eps=1e-6)))


def network(name: str, compiled: bool) -> Callable[[Work], Prepared]:
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
