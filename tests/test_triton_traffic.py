"""How much memory each Triton kernel moves, counted in the interpreter, against
docs/performance.md.

`fetched` are the distinct elements that a program loads, summed over programs: what is left of the
traffic where a program's own reloads hit its L1. Wide tensors are compared exactly, halo included.
"""

from __future__ import annotations

import pytest
import torch

from tests import triton_interpreter
from tests.triton_interpreter import KernelTrace, traced

pytestmark = pytest.mark.skipif(not triton_interpreter.available, reason="needs the interpreter")

# Two strips down the image, more segments than one program takes, channels off the tile.
N, H, C, K = 1, 6, 12, 7
WIDTHS = {torch.float32: 20, torch.bfloat16: 150}
STRIP = 4


@pytest.fixture(autouse=True)
def strips(monkeypatch: pytest.MonkeyPatch) -> None:
    from convnest_kernels.triton import heuristics

    monkeypatch.setattr(heuristics, "strip_rows", lambda *args, **kwargs: STRIP)


def halo_elements(dtype: torch.dtype, backward: bool) -> int:
    """Elements in all programs' windows that lie inside the image, from the tile's arithmetic."""
    from convnest_kernels.triton import heuristics

    w = WIDTHS[dtype]
    tile = heuristics.conv_tile(K, dtype, "90", backward)
    reach, count = K // 2, 0
    per_program = tile.block_p * tile.block_w
    for start in range(0, w, per_program):  # one image, so a program's segments are neighbours
        columns = min(w, start + per_program + reach) - max(0, start - reach)
        if tile.matrix:  # its windows are rounded up to 16 inputs
            last = min(w, start + per_program)
            last_segment = (last - 1) // tile.block_w * tile.block_w
            columns = min(w, last_segment - reach + tile.block_j) - max(0, start - reach)
        for top in range(0, H, STRIP):
            count += columns * (min(H, top + STRIP + reach) - max(0, top - reach)) * C
    return count


def run(dtype: torch.dtype, keep: bool = True) -> tuple[list[KernelTrace], list[KernelTrace]]:
    from convnest_kernels.triton import nested_conv

    h = torch.randn(N, H, WIDTHS[dtype], C).to(dtype)
    parameters = (torch.randn(C, 1, K, K), torch.randn(C), torch.randn(C), torch.randn(C))
    with traced() as forward:
        v, *kept = nested_conv.forward(h, *parameters, 1e-6, True, keep)
    if not keep:
        return forward, []
    with traced() as backward:
        nested_conv.backward(v, h, *kept, *parameters, 1e-6, True, [True] * 5)
    return forward, backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nested_conv(dtype: torch.dtype) -> None:
    pixels = N * H * WIDTHS[dtype]
    wide = pixels * C
    forward, backward = run(dtype)

    statistics, conv = (trace.traffic for trace in forward)
    assert statistics["x"].loads == wide
    assert statistics["mean"].stores == statistics["rstd"].stores == pixels
    assert conv["x"].fetched == halo_elements(dtype, backward=False)
    assert conv["total"].stores == conv["activated"].stores == wide
    assert conv["x"].stores == 0

    conv, sums, finish = (trace.traffic for trace in backward)
    assert conv["dy"].fetched == conv["total"].fetched == halo_elements(dtype, backward=True)
    assert conv["x"].fetched == wide
    assert conv["out"].stores == wide
    blocks = -(-C // (8 if dtype == torch.bfloat16 else 64))
    assert conv["row_sums"].stores == finish["row_sums"].loads == 2 * blocks * pixels
    assert conv["partials"].stores == sums["partials"].loads
    assert finish["p"].loads == finish["h"].loads == finish["p"].stores == wide


def test_nothing_is_kept_that_is_not_asked_for() -> None:
    (_, conv), _ = run(torch.bfloat16, keep=False)
    wide = N * H * WIDTHS[torch.bfloat16] * C
    assert conv.traffic["activated"].stores == wide
    assert sum(traffic.stores for traffic in conv.traffic.values()) == wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_read_and_written_once(dtype: torch.dtype) -> None:
    from convnest_kernels.triton import gelu_layernorm, layernorm_residual

    x, dy, t = (torch.randn(37, 240).to(dtype) for _ in range(3))
    vector = torch.randn(240)
    with traced() as traces:
        _, *kept = gelu_layernorm.forward(x, vector, vector, 1e-6, False, True)
        gelu_layernorm.backward(dy, x, *kept, vector, vector, 1e-6, False, [True] * 3)
    forward, backward, _ = (trace.traffic for trace in traces)
    assert forward["x"].loads == forward["y"].stores == x.numel()
    assert backward["dy"].loads == backward["x"].loads == backward["dx"].stores == x.numel()

    with traced() as traces:
        _, *kept = layernorm_residual.forward(t, x, vector, vector, vector, 1e-6, True)
        layernorm_residual.backward(dy, t, x, *kept, vector, vector, vector, 1e-6, [True] * 5)
    forward, backward, _ = (trace.traffic for trace in traces)
    assert forward["x"].loads == forward["residual"].loads == forward["y"].stores == x.numel()
    for name in ("dy", "x", "residual"):
        assert backward[name].loads == x.numel(), name
    assert backward["dx"].stores == backward["dresidual"].stores == x.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dwconv(dtype: torch.dtype) -> None:
    from convnest_kernels.triton import dwconv_gelu_layernorm

    wide = N * H * WIDTHS[dtype] * C
    x, dy = (torch.randn(N, H, WIDTHS[dtype], C).to(dtype) for _ in range(2))
    weight, vector = torch.randn(C, 1, K, K), torch.randn(C)
    parameters, options = (weight, vector, vector, vector), (1e-6, "gelu", False)
    with traced() as traces:
        _, *kept = dwconv_gelu_layernorm.forward(x, *parameters, *options, True)
    conv, rows = (trace.traffic for trace in traces)
    assert conv["x"].fetched == halo_elements(dtype, backward=False)
    assert conv["total"].stores == rows["x"].loads == rows["y"].stores == wide
    with traced() as traces:
        dwconv_gelu_layernorm.backward(dy, x, *kept, *parameters, *options, [True] * 5)
    rows, _, conv, _ = (trace.traffic for trace in traces)
    assert rows["dy"].loads == rows["x"].loads == rows["dx"].stores == wide
    assert conv["dy"].fetched == halo_elements(dtype, backward=True)
    assert conv["x"].fetched == conv["out"].stores == wide
