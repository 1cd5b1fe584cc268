"""What "auto" takes on an NVIDIA GPU: CUDA's kernels, Triton's, or eager where that is faster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from convnest_kernels import backends, cuda
from convnest_kernels.backends import Call
from convnest_kernels.doctor import dispatch

MATRIX = Call("nested_conv", "cuda", torch.bfloat16, 576, 7, (128, 56, 56, 576))
OTHERS = [
    MATRIX._replace(dtype=torch.float32),
    MATRIX._replace(kernel_size=3),
    MATRIX._replace(kernel_size=9),
    MATRIX._replace(operator="dwconv_gelu_layernorm"),
    Call("gelu_layernorm", "cuda", torch.float16, 576, None, (128, 56, 56, 576)),
]


@pytest.fixture
def both_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As on a machine with a GPU on which both backends run everything."""

    def on_gpus(call: Call) -> list[str]:
        return [] if call.device == "cuda" else ["it runs on GPUs"]

    for name in ("cuda", "triton"):
        monkeypatch.setattr(backends._package(name), "reasons_against", on_gpus)
    monkeypatch.setattr(cuda._host, "emulation", None)
    backends.select.cache_clear()
    yield monkeypatch
    backends.select.cache_clear()


@pytest.fixture
def without_cuda(both_run: pytest.MonkeyPatch) -> None:
    refuse = ["the native module was built without CUDA kernels"]
    both_run.setattr(cuda, "reasons_against", lambda call: refuse)


@pytest.mark.usefixtures("both_run")
@pytest.mark.parametrize("call", [MATRIX, *OTHERS], ids=str)
def test_cuda_comes_first(call: Call) -> None:
    assert backends.select(call, "auto") == "cuda"


@pytest.mark.usefixtures("without_cuda")
@pytest.mark.parametrize("call", OTHERS, ids=str)
def test_triton_where_cuda_cannot_run(call: Call) -> None:
    assert backends.select(call, "auto") == "triton"


@pytest.mark.usefixtures("without_cuda")
@pytest.mark.parametrize("kernel_size", [5, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_eager_where_triton_was_measured_to_be_slower(kernel_size: int, dtype: torch.dtype) -> None:
    call = MATRIX._replace(kernel_size=kernel_size, dtype=dtype)
    assert backends.select(call, "auto") == "eager"
    assert backends.select(call, "triton") == "triton"  # by name it runs all the same
    assert "  triton  can run it; auto: a training step on an H200" in str(
        backends.explain_call(call)
    )


@pytest.mark.usefixtures("without_cuda")
def test_what_was_measured_on_nvidia_says_nothing_of_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert backends.select(MATRIX, "auto") == "triton"


def test_doctor_shows_the_reason(without_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    lines = dispatch.show(dispatch.collect())
    (line,) = (line for line in lines if "a training step on an H200" in line)
    assert line.startswith("  auto passes over triton: ")
    assert line.endswith("[nested_conv bfloat16, nested_conv float16]")
