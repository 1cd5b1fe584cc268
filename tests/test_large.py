"""More than 2³¹ elements: addresses are 64-bit, tried without the memory that they span.

Each wide tensor is one image, mapped again and again over gigabytes of addresses, so that every
image of the batch holds the same values and gives the same results. The size of an image divides no
power of two: an offset cut to 32 bits leaves the mapping (a crash) or meets the image out of phase.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import CPU_ISAS

# Runs in a process of its own, which a wrong address may well end.
PROGRAM = """
import ctypes, mmap, os, sys
import torch
from convnest_kernels import _extension

cpu, bfloat16 = _extension.module.cpu, _extension.module.bfloat16
N, H, W, C, K = 4400, 128, 64, 60, 3
assert N * H * W * C > 2**31 and 2**32 % (H * W * C * 2)

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000


def repeat(image):
    '''The address of N images that are all the same memory, and a tensor over that memory.'''
    window = image.numel() * image.element_size()
    assert window % mmap.PAGESIZE == 0
    file = os.memfd_create("image")
    os.ftruncate(file, window)
    nowhere = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    base = libc.mmap(None, window * N, 0, nowhere, -1, 0)
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    for at in range(base, base + window * N, window):
        assert libc.mmap(at, window, protection, mmap.MAP_SHARED | MAP_FIXED, file, 0) == at
    memory = torch.frombuffer((ctypes.c_char * window).from_address(base), dtype=image.dtype)
    return base, memory.view(image.shape).copy_(image)


def call(function, inputs, parameters, outputs, gradients, options):
    '''Run N images and one: each output must be the same, each gradient N times as large.'''
    def run(n, activation_addresses, output_addresses):
        sums = [torch.full_like(p, float("nan")) for p in gradients]
        pointers = [p.data_ptr() for p in parameters]
        function(*activation_addresses, *pointers, *output_addresses,
                 *(p.data_ptr() for p in sums), *options(n))
        return sums

    one = run(1, [x.data_ptr() for x in inputs], [x.data_ptr() for x in outputs])
    poisoned = [repeat(torch.full_like(x, float("nan"))) for x in outputs]
    many = run(N, [repeat(x)[0] for x in inputs], [base for base, _ in poisoned])
    for (_, image), expected in zip(poisoned, outputs, strict=True):
        torch.testing.assert_close(image, expected, rtol=0, atol=0)
    for total, single in zip(many, one, strict=True):
        torch.testing.assert_close(total / N, single, rtol=1e-4, atol=1e-3)


wide = lambda: torch.randn(H, W, C).bfloat16()
column = lambda: torch.rand(H, W, 1) + 0.5  # mean or rstd
weight, vector = torch.randn(C, 1, K, K) / K, torch.randn(C)
conv = lambda *flags: lambda n: (n, H, W, C, K, *flags, bfloat16)
rows = lambda *flags: lambda n: (n * H * W, C, *flags, bfloat16)
out = [wide(), wide(), column(), column()]
statistics = [column(), column()]
match sys.argv[1]:
    case "nested_conv_forward":
        call(cpu.nested_conv_forward, [wide()], [weight, vector, vector, vector], out, [],
             conv(1e-6, True))
    case "nested_conv_backward":
        call(cpu.nested_conv_backward, [wide(), wide(), wide(), *statistics],
             [weight, vector, vector], out[:1], [weight, vector, vector, vector], conv(True))
    case "dwconv_gelu_layernorm_forward":
        call(cpu.dwconv_gelu_layernorm_forward, [wide()], [weight, vector, vector, vector], out, [],
             conv(1e-6, True, False))
    case "dwconv_gelu_layernorm_backward":
        call(cpu.dwconv_gelu_layernorm_backward, [wide(), wide(), wide(), *statistics],
             [weight, vector, vector], out[:1], [weight, vector, vector, vector],
             conv(True, False))
    case "gelu_layernorm_forward":
        call(cpu.gelu_layernorm_forward, [wide()], [vector, vector], [wide(), *statistics], [],
             rows(1e-6, False))
    case "gelu_layernorm_backward":
        call(cpu.gelu_layernorm_backward, [wide(), wide(), *statistics], [vector, vector], out[:1],
             [vector, vector], rows(False))
    case "layernorm_residual_forward":
        call(cpu.layernorm_residual_forward, [wide(), wide()], [vector, vector, vector],
             [wide(), *statistics], [], rows(1e-6))
    case "layernorm_residual_backward":
        call(cpu.layernorm_residual_backward, [wide(), wide(), wide(), *statistics],
             [vector, vector], out[:2], [vector, vector, vector], rows())
"""

FUNCTIONS = [
    f"{operator}_{direction}"
    for operator in ("nested_conv", "dwconv_gelu_layernorm", "gelu_layernorm", "layernorm_residual")
    for direction in ("forward", "backward")
]


@pytest.mark.skipif(not CPU_ISAS, reason="the native module is not built")
@pytest.mark.skipif(sys.platform != "linux", reason="needs memfd_create")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_addresses_beyond_32_bits(function: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, function],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stderr[-3000:]}"
