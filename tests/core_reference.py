"""The stems in float64 NumPy, and calls of the native core with NumPy arrays; no torch in here."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

EPS = 1e-6
erfc = np.vectorize(math.erfc, otypes=[np.float64])


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * erfc(-x / math.sqrt(2))


def gelu_grad(x: np.ndarray) -> np.ndarray:
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * erfc(-x / math.sqrt(2)) + x * density


def layer_norm(x: np.ndarray, weight: Any = None, bias: Any = None) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def depthwise(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """[N, H, W, C] with [C, K * K], zero-padded."""
    k = math.isqrt(weight.shape[1])
    p = k // 2
    padded = np.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    _, h, w, _ = x.shape
    taps = ((ky, kx) for ky in range(k) for kx in range(k))
    return sum(padded[:, y : y + h, x_ : x_ + w] * weight[:, y * k + x_] for y, x_ in taps)


def optional_sum(*terms: np.ndarray | None) -> np.ndarray:
    return sum(term for term in terms if term is not None)


def nested_conv(h, conv_weight, conv_bias, ln_weight, ln_bias, shortcut):
    g = gelu(h)
    conv = depthwise(layer_norm(g, ln_weight, ln_bias), conv_weight)
    return gelu(optional_sum(conv, g if shortcut else None, conv_bias))


def dwconv_gelu_layernorm(x, conv_weight, conv_bias, ln_weight, ln_bias, act, norm_first):
    c = optional_sum(depthwise(x, conv_weight), conv_bias)
    if not norm_first:
        return layer_norm(gelu(c) if act else c, ln_weight, ln_bias)
    y = layer_norm(c, ln_weight, ln_bias)
    return gelu(y) if act else y


def gelu_layernorm(x, ln_weight, ln_bias, norm_first):
    if norm_first:
        return gelu(layer_norm(x, ln_weight, ln_bias))
    return layer_norm(gelu(x), ln_weight, ln_bias)


def layernorm_residual(t, x, ln_weight, ln_bias, scale):
    return layer_norm(t, ln_weight, ln_bias) + (x if scale is None else x * scale)


# ---- storage types ----

STORAGE = {
    "float32": np.float32,
    "float64": np.float64,
    "bfloat16": np.uint16,
    "float16": np.float16,
}
EPSILON = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-9, "float16": 2.0**-11}


def encode(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "bfloat16":
        return x.astype(STORAGE[dtype])
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        x = (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)


def poisoned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return np.full(shape, 0x7FC0, np.uint16)
    return np.full(shape, np.nan, STORAGE[dtype])


def parameter_type(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def address(x: np.ndarray | None) -> int:
    return 0 if x is None else x.ctypes.data


class Core:
    """The native module's stems on float64 arrays: encodes, poisons outputs, calls, decodes.

    A parameter may be None. `forward` keeps what `backward` reads.
    """

    def __init__(self, module: Any, dtype: str) -> None:
        self.cpu, self.code = module.cpu, getattr(module, dtype)
        self.dtype, self.parameter_dtype = dtype, parameter_type(dtype)

    def activation(self, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(encode(x, self.dtype))

    def parameters(self, *values: np.ndarray | None) -> list[np.ndarray | None]:
        kind = STORAGE[self.parameter_dtype]
        return [v if v is None else np.ascontiguousarray(v.astype(kind)) for v in values]

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        return poisoned(shape, self.dtype)

    def empty_parameter(self, shape: tuple[int, ...]) -> np.ndarray:
        return poisoned(shape, self.parameter_dtype)

    def outputs(self, activations, parameters, needs) -> list[np.ndarray | None]:
        """Poisoned gradients of the given shapes; None where it is not needed."""
        new = [self.empty(shape) for shape in activations]
        new += [self.empty_parameter(shape) for shape in parameters]
        return [x if need else None for x, need in zip(new, needs, strict=True)]

    def decoded(self, x: np.ndarray | None) -> np.ndarray | None:
        if x is None:
            return None
        return decode(x, self.dtype if x.dtype == STORAGE[self.dtype] else self.parameter_dtype)

    def nested_conv(self, h, w, b, g, be, shortcut, dv, needs=(True,) * 5, keep=True):
        k = math.isqrt(w.shape[1])
        h, dv = self.activation(h), self.activation(dv)
        parameters = self.parameters(w, b, g, be)
        v, u = self.empty(h.shape), self.empty(h.shape)
        mean, rstd = (self.empty_parameter(h.shape[:3]) for _ in range(2))
        kept = (u, mean, rstd) if keep else (None,) * 3
        self.cpu.nested_conv_forward(
            *map(address, (h, *parameters, v, *kept)), *h.shape, k, EPS, shortcut, self.code
        )
        if not keep:
            return self.decoded(v), None
        shapes = [w.shape, *[w.shape[:1]] * 3]
        grads = self.outputs([h.shape], shapes, needs)
        inputs = (dv, h, u, mean, rstd, parameters[0], *parameters[2:])
        self.cpu.nested_conv_backward(
            *map(address, (*inputs, *grads)), *h.shape, k, shortcut, self.code
        )
        return self.decoded(v), [self.decoded(x) for x in grads]

    def dwconv_gelu_layernorm(self, x, w, b, g, be, act, norm_first, dy, needs=(True,) * 5):
        k = math.isqrt(w.shape[1])
        x, dy = self.activation(x), self.activation(dy)
        parameters = self.parameters(w, b, g, be)
        y, c = self.empty(x.shape), self.empty(x.shape)
        mean, rstd = (self.empty_parameter(x.shape[:3]) for _ in range(2))
        outputs = (*parameters, y, c, mean, rstd)
        switches = (act, norm_first, self.code)
        self.cpu.dwconv_gelu_layernorm_forward(
            *map(address, (x, *outputs)), *x.shape, k, EPS, *switches
        )
        grads = self.outputs([x.shape], [w.shape, *[w.shape[:1]] * 3], needs)
        inputs = (dy, x, c, mean, rstd, parameters[0], *parameters[2:])
        self.cpu.dwconv_gelu_layernorm_backward(
            *map(address, (*inputs, *grads)), *x.shape, k, *switches
        )
        return self.decoded(y), [self.decoded(grad) for grad in grads]

    def gelu_layernorm(self, x, g, be, norm_first, dy, needs=(True,) * 3):
        x, dy = self.activation(x), self.activation(dy)
        parameters = self.parameters(g, be)
        y = self.empty(x.shape)
        mean, rstd = (self.empty_parameter(x.shape[:1]) for _ in range(2))
        self.cpu.gelu_layernorm_forward(
            *map(address, (x, *parameters, y, mean, rstd)), *x.shape, EPS, norm_first, self.code
        )
        grads = self.outputs([x.shape], [x.shape[1:]] * 2, needs)
        inputs = (dy, x, mean, rstd, *parameters)
        self.cpu.gelu_layernorm_backward(
            *map(address, (*inputs, *grads)), *x.shape, norm_first, self.code
        )
        return self.decoded(y), [self.decoded(grad) for grad in grads]

    def layernorm_residual(self, t, x, g, be, scale, dy, needs=(True,) * 5):
        t, x, dy = self.activation(t), self.activation(x), self.activation(dy)
        g, be, scale = self.parameters(g, be, scale)
        y = self.empty(x.shape)
        mean, rstd = (self.empty_parameter(x.shape[:1]) for _ in range(2))
        self.cpu.layernorm_residual_forward(
            *map(address, (t, x, g, be, scale, y, mean, rstd)), *x.shape, EPS, self.code
        )
        grads = self.outputs([x.shape] * 2, [x.shape[1:]] * 3, needs)
        inputs = (dy, t, x, mean, rstd, g, scale)
        self.cpu.layernorm_residual_backward(*map(address, (*inputs, *grads)), *x.shape, self.code)
        return self.decoded(y), [self.decoded(grad) for grad in grads]

    def nested_block(self, x, parameters, shortcut, dy, recompute="none"):
        """`parameters` in the operator's order, conv_weight as [D, K * K]; a gradient for each."""
        x, dy = self.activation(x), self.activation(dy)
        held = self.parameters(*parameters)
        sizes = (*x.shape, held[0].shape[0], math.isqrt(held[4].shape[1]))
        wide, pixels = (*x.shape[:3], sizes[4]), x.shape[:3]
        y, t = self.empty(x.shape), self.empty(x.shape)
        h = self.empty(wide) if recompute in ("none", "conv") else None
        u = self.empty(wide) if recompute == "none" else None
        mean, rstd, post_mean, post_rstd = (self.empty_parameter(pixels) for _ in range(4))
        kept = (h, u, mean, rstd, t, post_mean, post_rstd)
        options = (*sizes, EPS, shortcut, self.code)
        inputs = [*map(address, (x, *held)), 0]
        self.cpu.nested_block_forward(inputs, list(map(address, (y, *kept))), *options)
        grads = self.outputs([x.shape], [p.shape for p in held], (True,) * 12)
        read = (dy, x, *kept, *held[:7], held[8], held[10])
        self.cpu.nested_block_backward(
            list(map(address, read)), list(map(address, grads)), *options
        )
        return self.decoded(y), [self.decoded(grad) for grad in grads]
