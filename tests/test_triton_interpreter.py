"""The repairs of Triton's interpreter: each fault that it must see is planted here."""

from __future__ import annotations

import pytest
import torch

from tests import triton_interpreter

if not triton_interpreter.available:
    pytest.skip("needs Triton, and no GPU", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def round_kernel(x, y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o).to(tl.bfloat16))


@triton.jit
def dot_kernel(a, b, c):
    o = tl.arange(0, 16)
    o = o[:, None] * 16 + o[None, :]
    tl.store(c + o, tl.dot(tl.load(a + o), tl.load(b + o)))


@triton.jit
def fault_kernel(x, y, n, FAULT: tl.constexpr):
    i = tl.program_id(0)
    o = tl.arange(0, 8)
    if FAULT == "load outside":
        tl.store(y + i * 8 + o, tl.load(x + n + o))
    elif FAULT == "two programs":
        tl.store(y + i + o, tl.load(x + o))
    elif FAULT == "one store":
        tl.store(y + o // 2, tl.load(x + o))
    elif FAULT == "read after write":
        tl.store(y + i * 8 + o, tl.load(y + o))
    else:
        tl.atomic_add(y + o, tl.load(x + o))


@triton.jit
def bfloat16_kernel(x, y):
    o = tl.arange(0, 8)
    tl.store(y + o, tl.load(x + o) * tl.load(x + o))


def test_bfloat16_rounds_to_nearest_even() -> None:
    x = torch.randn(512)
    x[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("nan"), float("inf")])
    y = torch.empty(512, dtype=torch.bfloat16)
    round_kernel[(1,)](x, y, BLOCK=512)
    assert torch.equal(y.nan_to_num(7), x.bfloat16().nan_to_num(7))


def test_bfloat16_dot_multiplies_numbers() -> None:
    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    c = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, c)
    torch.testing.assert_close(c, a.float() @ b.float())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("load outside", "load outside of every tensor"),
        ("two programs", "writes what another wrote"),
        ("one store", "writes an element twice"),
        ("read after write", "reads what another wrote"),
        ("atomics", "order of programs"),
    ],
)
def test_faults_are_seen(fault: str, message: str) -> None:
    x, y = torch.randn(16), torch.zeros(16)
    with pytest.raises(InterpreterError, match=message):
        fault_kernel[(2,)](x, y, 16, FAULT=fault)


def test_bfloat16_arithmetic_is_refused() -> None:
    x = torch.randn(8).bfloat16()
    with pytest.raises(InterpreterError, match="convert to float32"):
        bfloat16_kernel[(1,)](x, torch.empty_like(x))
