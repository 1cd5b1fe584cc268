"""NestedBlock: the ConvNeSt block, in each of the paper's designs, for [N, C, H, W]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import backends, ops
from ..reference.common import depthwise_conv, layer_norm, linear
from . import _arguments


class NestedBlock(nn.Module):
    """The ConvNeSt block: a depthwise convolution between two pointwise layers, [N, C, H, W].

    With D = expansion · C wide channels, W1 and W2 the pointwise layers, s the ResScale and DW the
    depthwise k×k convolution (section 3 of the paper, "Convolution on your 12× wide feature"):

        vanilla          y = s·x + W2(GELU(norm2(DW(GELU(norm(W1(x)))))))
        pre_activation   y = s·x + W2(norm2(GELU(DW(norm(GELU(W1(x)))))))
        post_norm        y = s·x + norm2(W2(GELU(DW(norm(g)))))         g = GELU(W1(x))
        convnest         y = s·x + norm2(W2(GELU(g + DW(norm(g)))))     g = GELU(W1(x))

    `norm2` spans the D wide channels in the first two designs and the C narrow ones in the others.
    Parameters are named as in timm's ConvNeXt where a part is the same: `conv_dw`, `norm`,
    `mlp.fc1`, `mlp.fc2`, `gamma`; `norm2` and `res_scale` are ours. Names and shapes do not depend
    on the backend, so that state dicts are interchangeable. The fused operators read the weights:
    forward hooks on the linear layers, the convolution and the LayerNorms do not run.

    Args:
        dim: channels C of input and output.
        expansion: D / C, an int or a float that gives a whole D (Table 2 goes from 4 to 16).
        kernel_size: odd size of the depthwise kernel; the map keeps its size.
        design: "vanilla", "pre_activation", "post_norm" or "convnest".
        norm: (first, second), each "layer" or "batch": `norm`, before the convolution, and
            `norm2` (Table 3). A batch norm is torch's own, with running statistics.
        res_scale: initial value of s, one parameter per channel; None leaves the shortcut plain.
        layer_scale: initial value of `gamma`, which multiplies the branch (what is added to s·x)
            per channel; None leaves it out.
        shortcut: False takes the inner shortcut `g +` out of "convnest" (which is "post_norm").
        drop_path: probability, in [0, 1), that a sample of a training batch skips the branch; the
            others are scaled by 1 / (1 - drop_path).
        eps: of both norms.
        recompute: what backward computes again to save memory. "none"; "conv": everything between
            W1 and W2, so that of the wide tensors only W1's output is kept; "all": the whole block
            from x.
        backend: of every operator inside, as in `convnest_kernels.ops`; None follows
            `use_backend`. "eager" is the same block in plain PyTorch.

    Input and output: [N, C, H, W] of one floating dtype, any H and W; an empty batch is allowed
    where no batch norm trains on it. channels_last is the fast format. The result has the memory
    format of the input: contiguous for a contiguous input (which costs a copy in and a copy out),
    channels_last for an input whose channels lie densest.

    Raises TypeError or ValueError naming the argument, here and in forward; BackendError where
    `backend` cannot run a call.
    """

    def __init__(
        self,
        dim: int,
        *,
        expansion: float = 12,
        kernel_size: int = 7,
        design: str = "convnest",
        norm: tuple[str, str] = ("layer", "layer"),
        res_scale: float | None = 1.0,
        layer_scale: float | None = None,
        shortcut: bool = True,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        recompute: str = "none",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.dim = _arguments.positive_int("dim", dim)
        self.wide_dim = _arguments.wide_channels(dim, expansion)
        self.kernel_size = _arguments.odd_kernel_size(kernel_size)
        self.design = _arguments.choice("design", design, _arguments.DESIGNS)
        first, second = _arguments.norm_pair(norm)
        self.shortcut = _arguments.inner_shortcut(shortcut, design)
        self.drop_path = _arguments.probability("drop_path", drop_path)
        self.eps = _arguments.positive("eps", eps)
        self.recompute = _arguments.choice("recompute", recompute, _arguments.RECOMPUTE)
        self.backend = None if backend is None else backends.check_name(backend)
        self.norm_is_last = design in ("post_norm", "convnest")

        self.conv_dw = nn.Conv2d(
            self.wide_dim,
            self.wide_dim,
            self.kernel_size,
            padding=self.kernel_size // 2,
            groups=self.wide_dim,
        )
        self.norm = _make_norm(first, self.wide_dim, self.eps)
        self.mlp = _PointwiseLayers(dim, self.wide_dim)
        self.norm2 = _make_norm(second, dim if self.norm_is_last else self.wide_dim, self.eps)
        self.gamma = _per_channel("layer_scale", layer_scale, dim)
        self.res_scale = _per_channel("res_scale", res_scale, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from a normal truncated at ±2, std 0.02; set their biases to zero."""
        for layer in (self.conv_dw, self.mlp.fc1, self.mlp.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.dim:
            raise ValueError(f"x must be [N, {self.dim}, H, W], got {list(x.shape)}")
        channels_last = x.stride(1) == 1
        y = self._forward(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
        return y if channels_last else y.contiguous()

    # From here on tensors are [N, H, W, C].

    def _forward(self, x: Tensor) -> Tensor:
        # Resolved once, so that what backward computes again runs on the backend of forward.
        backend = backends.requested(self.backend)
        keep = self._draw_samples(x)
        if keep is None and self._is_fused():
            conv, norm, fc1, fc2 = self.conv_dw, self.norm, self.mlp.fc1, self.mlp.fc2
            return ops.nested_block(
                x,
                fc1.weight,
                fc1.bias,
                norm.weight,
                norm.bias,
                conv.weight,
                conv.bias,
                fc2.weight,
                fc2.bias,
                *self._scaled_norm2(),
                self.res_scale,
                eps=self.eps,
                shortcut=self.shortcut,
                recompute=self.recompute,
                backend=backend,
            )
        if self.recompute == "all":
            return self._checkpoint(self._block, x, keep, backend)
        return self._block(x, keep, backend)

    def _is_fused(self) -> bool:
        norms_are_layer = _is_layer_norm(self.norm) and _is_layer_norm(self.norm2)
        return self.norm_is_last and norms_are_layer

    def _block(self, x: Tensor, keep: Tensor | None, backend: str) -> Tensor:
        h = linear(x, self.mlp.fc1.weight, self.mlp.fc1.bias)  # [N, H, W, D]
        if self.recompute == "conv":
            t = self._checkpoint(self._wide_to_narrow, h, backend)
        else:
            t = self._wide_to_narrow(h, backend)
        return self._join(t, x, keep, backend)

    def _wide_to_narrow(self, h: Tensor, backend: str) -> Tensor:
        return linear(self._wide(h, backend), self.mlp.fc2.weight, self.mlp.fc2.bias)

    def _wide(self, h: Tensor, backend: str) -> Tensor:
        """What the design does between the pointwise layers, at width D."""
        conv = self.conv_dw.weight, self.conv_dw.bias
        if self.norm_is_last:
            if _is_layer_norm(self.norm):
                return ops.nested_conv(
                    h,
                    *conv,
                    self.norm.weight,
                    self.norm.bias,
                    eps=self.eps,
                    shortcut=self.shortcut,
                    backend=backend,
                )
            g = F.gelu(h)
            u = depthwise_conv(_normalize(g, self.norm), *conv)
            return F.gelu(g + u if self.shortcut else u)

        norm_first = self.design == "vanilla"
        z = _gelu_and_norm(h, self.norm, norm_first, backend)
        if _is_layer_norm(self.norm2):
            return ops.dwconv_gelu_layernorm(
                z,
                *conv,
                self.norm2.weight,
                self.norm2.bias,
                eps=self.eps,
                norm_first=norm_first,
                backend=backend,
            )
        return _gelu_and_norm(depthwise_conv(z, *conv), self.norm2, norm_first, backend)

    def _join(self, t: Tensor, x: Tensor, keep: Tensor | None, backend: str) -> Tensor:
        """Add the shortcut: y = s·x + branch, which is t, or norm2(t) where the norm comes last."""
        if self.norm_is_last and _is_layer_norm(self.norm2) and keep is None:
            weight, bias = self._scaled_norm2()
            return ops.layernorm_residual(
                t, x, weight, bias, self.res_scale, eps=self.eps, backend=backend
            )
        # In the dtype of t throughout, as the fused operator: under autocast norms are float32.
        branch = _normalize(t, self.norm2).to(t.dtype) if self.norm_is_last else t
        if self.gamma is not None:
            branch = self.gamma.to(t.dtype) * branch
        if keep is not None:
            branch = keep.to(t.dtype) * branch
        x = x.to(t.dtype)
        return branch + (x if self.res_scale is None else self.res_scale.to(t.dtype) * x)

    def _scaled_norm2(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of norm2 times gamma: γ·(w·x̂ + b) is a norm with γ·w and γ·b."""
        if self.gamma is None:
            return self.norm2.weight, self.norm2.bias
        return self.gamma * self.norm2.weight, self.gamma * self.norm2.bias

    def _draw_samples(self, x: Tensor) -> Tensor | None:
        """Stochastic depth: 0 or 1 / (1 - p) for each sample, [N, 1, 1, 1]; None if inactive."""
        if not self.training or self.drop_path == 0:
            return None
        keep = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(1 - self.drop_path)
        return keep / (1 - self.drop_path)

    def _checkpoint(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Run `function` now, and again in backward in place of keeping what it computes."""
        if not torch.is_grad_enabled():
            return function(*args)
        options: dict[str, Any] = {}
        batch_norms = [m for m in (self.norm, self.norm2) if not isinstance(m, nn.LayerNorm)]
        # A compiled graph updates running statistics once by itself, and traces no context_fn.
        if batch_norms and not torch.compiler.is_compiling():
            options["context_fn"] = lambda: (nullcontext(), _holding_statistics(batch_norms))
        # Nothing random is inside: samples are drawn before.
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **options)

    def extra_repr(self) -> str:
        parts = [
            f"{self.dim}, expansion={self.wide_dim / self.dim:g}, kernel_size={self.kernel_size}",
            f"design={self.design!r}",
        ]
        if self.design == "convnest" and not self.shortcut:
            parts.append("shortcut=False")
        if self.res_scale is None:
            parts.append("res_scale=None")
        if self.gamma is not None:
            parts.append("layer_scale")
        if self.drop_path:
            parts.append(f"drop_path={self.drop_path:g}")
        if self.recompute != "none":
            parts.append(f"recompute={self.recompute!r}")
        if self.backend is not None:
            parts.append(f"backend={self.backend!r}")
        return ", ".join(parts)


class _PointwiseLayers(nn.Module):
    """W1 and W2, under the names they have in timm's ConvNeXt. NestedBlock reads their weights."""

    def __init__(self, dim: int, wide_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, wide_dim)
        self.fc2 = nn.Linear(wide_dim, dim)


def _make_norm(kind: str, channels: int, eps: float) -> nn.LayerNorm | nn.BatchNorm2d:
    if kind == "layer":
        return nn.LayerNorm(channels, eps=eps)
    return nn.BatchNorm2d(channels, eps=eps)


def _per_channel(name: str, value: float | None, dim: int) -> nn.Parameter | None:
    if value is None:
        return None
    return nn.Parameter(torch.full((dim,), _arguments.number(name, value)))


def _is_layer_norm(norm: nn.Module) -> bool:
    # Not "is no BatchNorm2d": SyncBatchNorm may have replaced it.
    return isinstance(norm, nn.LayerNorm)


def _normalize(x: Tensor, norm: nn.LayerNorm | nn.BatchNorm2d) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        return layer_norm(x, norm.weight, norm.bias, norm.eps)
    return norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _gelu_and_norm(
    x: Tensor, norm: nn.LayerNorm | nn.BatchNorm2d, norm_first: bool, backend: str
) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        return ops.gelu_layernorm(
            x, norm.weight, norm.bias, eps=norm.eps, norm_first=norm_first, backend=backend
        )
    return F.gelu(_normalize(x, norm)) if norm_first else _normalize(F.gelu(x), norm)


@contextmanager
def _holding_statistics(norms: Sequence[nn.BatchNorm2d]) -> Iterator[None]:
    """Run batch norms as usual, but leave their running statistics and counts as they are."""
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, count) in zip(norms, before, strict=True):
        norm.momentum = 0.0  # and not track_running_stats = False, which saves fewer tensors
        norm.num_batches_tracked = None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
