"""ops.nested_block: numbers on every instruction set, and what PyTorch asks of an operator.

On the CPU kernels the block is one registered operator; on the other backends a composition, whose
parts tests/test_operators.py and tests/test_op_contract.py hold.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from convnest_kernels import BackendError, ops, reference
from tests.conftest import CPU_ISAS
from tests.tolerances import assert_accurate

NAMES = [
    "x",
    "fc1_weight",
    "fc1_bias",
    "norm_weight",
    "norm_bias",
    "conv_weight",
    "conv_bias",
    "fc2_weight",
    "fc2_bias",
    "post_weight",
    "post_bias",
    "scale",
]
OPTIONAL = [name for name in NAMES if name.endswith("bias")] + [
    "norm_weight",
    "post_weight",
    "scale",
]
RECOMPUTE = ["none", "conv", "all"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LOW = DTYPES[1:3]

each_isa = pytest.mark.parametrize("backend", [f"cpu-{isa}" for isa in CPU_ISAS], indirect=True)
each_recompute = pytest.mark.parametrize("recompute", RECOMPUTE)
pytestmark = pytest.mark.skipif(not CPU_ISAS, reason="no native core")


@dataclass(frozen=True)
class Case:
    """Sizes of a block, and which of its parameters are None."""

    shape: tuple[int, int, int, int]
    wide: int
    kernel_size: int = 7
    shortcut: bool = True
    none: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{'x'.join(map(str, self.shape))}-{self.wide}-k{self.kernel_size}"
        return text + ("" if self.shortcut else "-plain") + ("-none" if self.none else "")


# Channels off every vector and register tile; odd C for the operands that come in pairs; maps
# smaller than the kernel, of one step, of several; several bands and chunks, from even rows on and
# from odd ones. From 865 wide channels on small maps are done in slices: two groups of images, one
# slice and a bit, all that may be None.
CASES = [
    Case((1, 1, 1, 1), 12),
    Case((2, 1, 5, 3), 7, 3),
    Case((2, 7, 7, 20), 240),
    Case((1, 9, 8, 17), 50, 5, shortcut=False),
    Case((3, 11, 15, 8), 96),
    Case((1, 17, 12, 5), 33, 9, none=tuple(OPTIONAL)),
    Case((2, 31, 6, 16), 64, none=("norm_bias", "fc1_bias", "scale")),
    Case((1, 5, 9, 24), 288, 11),
    Case((1, 14, 3, 33), 65, 13),
    Case((1, 30, 29, 6), 40, 3),
    Case((1, 13, 4, 7), 40, 3),
    Case((7, 7, 7, 20), 1000),
    Case((2, 13, 16, 6), 880, 5, shortcut=False),
    Case((3, 16, 2, 33), 865, 13, none=tuple(OPTIONAL)),
]
SMALL = Case((2, 6, 5, 4), 48, 3)


def arguments(
    case: Case, dtype: torch.dtype, parameter_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Leaves by name, None left out; the same values in every dtype, up to rounding."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    c, d, k = case.shape[-1], case.wide, case.kernel_size
    shapes = [case.shape, (d, c), (d,), (d,), (d,), (d, 1, k, k), (d,), (c, d)] + 4 * [(c,)]
    found = {}
    for name, shape in zip(NAMES, shapes, strict=True):
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 1:
            value = 0.2 * value + (name in ("norm_weight", "post_weight", "scale"))
        elif name != "x":
            value = value / math.sqrt(value[0].numel())
        if name == "norm_bias":
            value += 2  # padding before the norm would show
        kind = dtype if name == "x" else parameter_dtype or dtype
        if name not in case.none:
            found[name] = value.to(kind).requires_grad_()
    return found


def call(function: Callable[..., Tensor], tensors: dict[str, Tensor], **options: Any) -> Tensor:
    return function(**{name: tensors.get(name) for name in NAMES}, **options)


def cotangent(case: Case, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(case.shape, generator=generator, dtype=torch.float64).to(dtype)


def results(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], dy: Tensor, **options: Any
) -> dict[str, Tensor]:
    y = call(function, tensors, **options)
    grads = torch.autograd.grad(y, list(tensors.values()), dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(tensors, grads, strict=True)}


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().double().requires_grad_() for name, x in tensors.items()}


def largest_rstd(tensors: dict[str, Tensor], shortcut: bool) -> float:
    """Of both norms, which multiply what was rounded before them."""
    args = [doubled(tensors).get(name) for name in NAMES]
    forward = torch.ops.convnest.nested_block_forward
    *_, rstd, _, _, post_rstd = forward(*args, 1e-6, shortcut, "all")
    return rstd.max().item() * post_rstd.max().item()


def check(case: Case, tensors: dict[str, Tensor], backend: str) -> None:
    dy = cotangent(case, tensors["x"].dtype)
    truth = results(reference.nested_block, doubled(tensors), dy.double(), shortcut=case.shortcut)
    eager = results(reference.nested_block, tensors, dy, shortcut=case.shortcut)
    options = {"shortcut": case.shortcut, "backend": backend}
    every = [results(ops.nested_block, tensors, dy, recompute=r, **options) for r in RECOMPUTE]
    pixels, rstd = math.prod(case.shape[:-1]), largest_rstd(tensors, case.shortcut)
    for name, ours in every[0].items():
        rows = 1 if name in ("y", "dx") else pixels
        assert_accurate(name, ours, eager[name], truth[name], rows, rstd)
        for recompute, other in zip(RECOMPUTE[1:], every[1:], strict=True):
            assert torch.equal(other[name], ours), f"{name} with recompute={recompute}"
    with torch.no_grad():
        assert torch.equal(call(ops.nested_block, tensors, **options), every[0]["y"])


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(case: Case, dtype: torch.dtype, backend: str) -> None:
    check(case, arguments(case, dtype), backend)


@each_isa
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_float32_parameters_beside_low_precision_activations(
    dtype: torch.dtype, backend: str
) -> None:
    check(CASES[2], arguments(CASES[2], dtype, torch.float32), backend)


@each_recompute
@pytest.mark.parametrize("shortcut", [True, False])
def test_gradcheck_and_gradgradcheck(shortcut: bool, recompute: str) -> None:
    case = Case((1, 3, 4, 2), 5, 3)
    tensors = arguments(case, torch.float64)

    def function(*args: Tensor) -> Tensor:
        return ops.nested_block(*args, shortcut=shortcut, recompute=recompute, backend="cpu")

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))
    assert torch.autograd.gradgradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("case", [CASES[3], CASES[5]], ids=str)
@pytest.mark.parametrize("recompute", [*RECOMPUTE, None])
def test_opcheck(case: Case, recompute: str | None) -> None:
    tensors = arguments(case, torch.float32)
    x, *parameters = [t if t is None else t.detach() for t in map(tensors.get, NAMES)]
    forward = torch.ops.convnest.nested_block_forward.default
    torch.library.opcheck(forward, (x, *parameters, 1e-6, True, recompute))
    _, *kept = forward(x, *parameters, 1e-6, True, recompute)
    if recompute is None:
        assert not kept
        return
    backward = torch.ops.convnest.nested_block_backward.default
    present = [name in tensors for name in NAMES]
    for needs in (present, [i == 0 for i in range(len(NAMES))]):
        dy = cotangent(case, torch.float32)
        torch.library.opcheck(backward, (dy, x, *kept, *parameters, 1e-6, True, needs))


@each_recompute
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_forward_and_backward(dynamic: bool, recompute: str) -> None:
    torch.compiler.reset()
    function = torch.compile(ops.nested_block, fullgraph=True, dynamic=dynamic)
    for case in (SMALL, Case((3, 8, 9, 4), 48, 3)):
        tensors, dy = arguments(case, torch.float32), cotangent(case, torch.float32)
        expected = results(ops.nested_block, tensors, dy)
        torch.testing.assert_close(results(function, tensors, dy, recompute=recompute), expected)


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return ops.nested_block(*args)

    args = tuple(x.detach() for x in arguments(SMALL, torch.float32).values())
    exported = torch.export.export(Module(), args)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert "convnest.nested_block_forward.default" in targets
    assert torch.equal(exported.module()(*args), ops.nested_block(*args))


@each_recompute
def test_autocast_casts_x_and_keeps_float32_parameters(recompute: str) -> None:
    tensors, dy = arguments(SMALL, torch.float32), cotangent(SMALL, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(ops.nested_block, tensors, dy, recompute=recompute)
    low = {n: x.detach().to(torch.bfloat16 if n == "x" else x.dtype) for n, x in tensors.items()}
    low = {name: x.requires_grad_() for name, x in low.items()}
    expected = results(ops.nested_block, low, dy.bfloat16())
    assert ours["y"].dtype == torch.bfloat16
    for name, mine in ours.items():
        assert name == "y" or mine.dtype == torch.float32
        assert torch.equal(mine, expected[name].to(mine.dtype)), name
    with torch.autocast("cpu", torch.bfloat16):
        assert call(ops.nested_block, doubled(tensors)).dtype == torch.float64


def test_func_transforms() -> None:
    tensors = {n: x.detach() for n, x in arguments(SMALL, torch.float64).items()}
    args = tuple(tensors.values())

    def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: function(*args).square().sum()

    every = tuple(range(len(args)))
    torch.testing.assert_close(
        torch.func.grad(loss(ops.nested_block), every)(*args),
        torch.func.grad(loss(reference.nested_block), every)(*args),
    )
    tangents = tuple(torch.randn_like(x) for x in args)
    torch.testing.assert_close(
        torch.func.jvp(ops.nested_block, args, tangents),
        torch.func.jvp(reference.nested_block, args, tangents),
    )
    torch.compiler.reset()
    compiled = torch.compile(torch.func.grad(loss(ops.nested_block)), fullgraph=True)
    torch.testing.assert_close(
        compiled(*args), torch.func.grad(loss(reference.nested_block))(*args)
    )
    with pytest.raises(BackendError, match=r"under a torch\.func transform"):
        torch.func.grad(lambda x: ops.nested_block(x, *args[1:], backend="cpu").sum())(args[0])


@each_recompute
def test_any_strides(recompute: str) -> None:
    tensors, dy = arguments(SMALL, torch.float32), cotangent(SMALL, torch.float32)
    expected = results(ops.nested_block, tensors, dy)
    strided = {}
    for name, x in tensors.items():
        order = range(x.dim())[::-1]
        base = x.detach().permute(*order).contiguous().permute(*order)
        strided[name] = base.requires_grad_()
    dy = dy.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    ours = results(ops.nested_block, strided, dy, recompute=recompute)
    for name, value in ours.items():
        assert torch.equal(value, expected[name]), name
        if name != "y":
            assert value.stride() == strided[name[1:]].stride(), name
    assert ours["y"].is_contiguous()


@each_recompute
@pytest.mark.parametrize("shape", [(0, 5, 6, 4), (2, 0, 6, 4), (2, 5, 0, 4)], ids=str)
def test_empty(shape: tuple[int, int, int, int], recompute: str) -> None:
    case = Case(shape, 24, 3)
    found = results(
        ops.nested_block,
        arguments(case, torch.float32),
        cotangent(case, torch.float32),
        recompute=recompute,
    )
    assert found.pop("y").shape == shape
    for name, grad in found.items():
        assert not grad.any(), name


@each_isa
@each_recompute
def test_only_the_gradients_asked_for(recompute: str, backend: str) -> None:
    tensors, dy = arguments(CASES[3], torch.float32), cotangent(CASES[3], torch.float32)
    options = {"backend": backend, "recompute": recompute}
    everything = results(ops.nested_block, tensors, dy, **options)
    for name, tensor in tensors.items():
        for other in tensors.values():
            other.requires_grad_(other is tensor)
        (grad,) = torch.autograd.grad(call(ops.nested_block, tensors, **options), tensor, dy)
        assert torch.equal(grad, everything[f"d{name}"]), name


@pytest.mark.usefixtures("threads")
@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case((3, 23, 17, 8), 50),  # bands that share the rows about their edges
        Case((1, 23, 5, 8), 50),  # too short for that on five threads
        Case((1, 7, 7, 24), 288),
        Case((7, 7, 7, 6), 880),  # slices of four images, then of three
    ],
    ids=str,
)
def test_same_bits_for_every_run_and_thread_count(
    case: Case, dtype: torch.dtype, backend: str
) -> None:
    tensors, dy = arguments(case, dtype), cotangent(case, dtype)
    found = []
    for threads, recompute in ((1, "none"), (2, "conv"), (3, "all"), (2, "none"), (5, "all")):
        torch.set_num_threads(threads)
        options = {"backend": backend, "recompute": recompute}
        found.append(results(ops.nested_block, tensors, dy, **options))
    for other in found[1:]:
        for name, value in other.items():
            assert torch.equal(value, found[0][name]), name


@each_isa
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_reach(value: float, backend: str) -> None:
    tensors = arguments(Case((1, 13, 13, 4), 48, 3), torch.float32)
    with torch.no_grad():
        clean = call(ops.nested_block, tensors, backend=backend)
        tensors["x"][0, 6, 6, 0] = value
        y = call(ops.nested_block, tensors, backend=backend)
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[:, 5:8, 5:8] = True
    assert not y[reached].isfinite().any()
    assert torch.equal(y[~reached], clean[~reached])


# What is kept for backward.


@pytest.mark.parametrize(("recompute", "wide"), [("none", 2), ("conv", 1), ("all", 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_held_for_backward(dtype: torch.dtype, recompute: str, wide: int) -> None:
    """The wide tensors that are told, x, t, and four statistics a pixel: under 3 narrow tensors."""
    tensors = arguments(Case((2, 8, 8, 48), 576), dtype, torch.float32)
    parameters = {p.data_ptr() for name, p in tensors.items() if name != "x"}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            held[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(ops.nested_block, tensors, recompute=recompute)
    narrow, pixels = tensors["x"].nbytes, tensors["x"][..., 0].numel()
    assert sum(held.values()) == (12 * wide + 2) * narrow + 4 * 4 * pixels
    assert sum(held.values()) < (12 * wide + 3) * narrow


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    tensors, dy = arguments(SMALL, torch.float32), cotangent(SMALL, torch.float32)
    for recompute in RECOMPUTE:
        with FlopCounterMode(display=False) as counter:
            y = call(ops.nested_block, tensors, recompute=recompute)
            forward = counter.get_total_flops()
            y.backward(dy)
        assert forward == 2 * 2 * 6 * 5 * 48 * (4 + 9 + 4)
        assert counter.get_total_flops() == 3 * forward
