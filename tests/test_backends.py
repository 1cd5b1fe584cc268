"""Selection: what auto picks, what a named backend refuses, and how it is explained."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from bench.cases import OPERATORS, Case, make_inputs
from convnest_kernels import BackendError, backends, explain, ops, use_backend
from convnest_kernels.backends import BACKENDS, Call
from tests.conftest import BACKENDS as BACKENDS_HERE

CALL = Call("nested_conv", "cpu", torch.float32, 48, 7, (2, 8, 8, 48))


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def refuse(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setattr(
            backends._package(name), "reasons_against", lambda call, name=name: [f"{name} is off"]
        )


@pytest.mark.parametrize("operator", OPERATORS)
def test_auto_picks_the_first_without_reasons(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = CALL._replace(operator=operator)
    refuse(monkeypatch, "cuda", "triton")
    assert backends.select(call, "auto") == "cpu"
    backends.select.cache_clear()
    refuse(monkeypatch, "cpu")
    assert backends.select(call, "auto") == "eager"


def test_a_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "cpu")
    inputs = make_inputs(Case("nested_conv", (1, 4, 4, 6)), torch.float32)
    for context in (True, False):
        with pytest.raises(BackendError, match="backend='cpu' cannot run nested_conv on cpu"):
            if context:
                with use_backend("cpu"):
                    ops.nested_conv(*inputs.args)
            else:
                ops.nested_conv(*inputs.args, backend="cpu")


def test_the_error_shows_every_list(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, *BACKENDS)
    with pytest.raises(BackendError) as error:
        backends.select(CALL, "auto")
    for name in BACKENDS:
        assert f"{name}: {name} is off" in str(error.value)


def test_unknown_names() -> None:
    x = torch.randn(1, 2, 2, 3)
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'cuda'.*got 'metal'"):
        ops.gelu_layernorm(x, None, None, backend="metal")
    with pytest.raises(ValueError, match="got 'metal'"), use_backend("metal"):
        pass
    code = (
        "import torch, convnest_kernels as c; c.ops.gelu_layernorm(torch.randn(2, 3), None, None)"
    )
    result = run(code, CONVNEST_BACKEND="metal")
    assert result.returncode == 1
    assert "ValueError: CONVNEST_BACKEND must be one of" in result.stderr


def test_the_argument_beats_the_context_beats_the_environment() -> None:
    code = """
import torch, convnest_kernels as c
from convnest_kernels.backends import requested
assert requested(None) == "cpu"
with c.use_backend("triton"):
    assert requested(None) == "triton"
    assert requested("eager") == "eager"
    with c.use_backend("auto"):
        assert requested(None) == "auto"
    assert requested(None) == "triton"
assert requested(None) == "cpu"
"""
    result = run(code, CONVNEST_BACKEND="cpu")
    assert result.returncode == 0, result.stderr


def test_backward_runs_on_the_backend_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(Case("gelu_layernorm", (2, 3, 6)), torch.float32)
    seen = []
    implementation = backends.implementation

    def record(call: Call, requested: str) -> object:
        seen.append(requested)
        return implementation(call, requested)

    monkeypatch.setattr(backends, "implementation", record)
    monkeypatch.setattr("convnest_kernels.ops._contract.runs_eager", lambda call, requested: False)
    with use_backend("eager"):
        y = ops.gelu_layernorm(*inputs.args)
    y.sum().backward()
    assert seen == ["eager", "eager"]


def test_explain() -> None:
    inputs = make_inputs(Case("nested_conv", (1, 4, 4, 6)), torch.float32)
    explanation = explain(ops.nested_conv, *inputs.args)
    assert explanation.call.operator == "nested_conv"
    assert explanation.backend is not None
    assert not explanation.reasons[explanation.backend]
    assert list(explanation.reasons) == list(BACKENDS)
    forced = explain(ops.nested_conv, *inputs.args, backend="cuda")
    assert forced.backend is None
    assert "no backend can run it" in str(forced)
    assert "cuda" in str(forced)


def test_explain_checks_its_arguments() -> None:
    with pytest.raises(TypeError, match="operator must be a function of convnest_kernels.ops"):
        explain(torch.relu, torch.ones(2))
    with pytest.raises(ValueError, match=r"conv_weight must be \[6, 1, k, k\]"):
        explain(ops.nested_conv, torch.ones(1, 4, 4, 6), torch.ones(5, 1, 3, 3), None, None, None)


def test_explain_the_block() -> None:
    c, d = 4, 48
    shapes = [(2, 6, 5, c), (d, c), (d,), (d,), (d,), (d, 1, 3, 3), (d,), (c, d)] + 3 * [(c,)]
    explanation = explain(ops.nested_block, *(torch.randn(shape) for shape in shapes))
    assert explanation.call == Call("nested_conv", "cpu", torch.float32, d, 3, (2, 6, 5, d))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (CALL._replace(device="cuda"), "it runs on CPU tensors, got cuda"),
        (CALL._replace(dtype=torch.complex64), "it has no kernel for torch.complex64"),
        (CALL._replace(kernel_size=15), "its kernel sizes are 3, 5, 7, 9, 11, 13, got 15"),
    ],
)
def test_reasons_against_cpu(call: Call, reason: str) -> None:
    assert reason in backends.reasons_against("cpu", call)


@pytest.mark.parametrize("requested", ["auto", "eager"])
def test_a_kernel_size_without_kernels_runs_on_eager(requested: str) -> None:
    inputs = make_inputs(Case("nested_conv", (1, 4, 4, 6), kernel_size=15), torch.float32)
    assert explain(ops.nested_conv, *inputs.args, backend=requested).backend == "eager"
    torch.testing.assert_close(
        ops.nested_conv(*inputs.args, backend=requested),
        ops.nested_conv(*inputs.args, backend="eager"),
    )


def test_import_without_extension_and_triton() -> None:
    """What cannot be imported is a reason, not a crash."""
    code = """
import sys
sys.modules["convnest_kernels._C"] = None
sys.modules["triton"] = None
import torch, convnest_kernels as c
x = torch.randn(2, 3, 6)
e = c.explain(c.ops.gelu_layernorm, x, None, None)
assert e.backend == "eager", e
assert "_C could not be imported" in e.reasons["cpu"][0], e
c.ops.gelu_layernorm(x, None, None)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif("cpu-portable" not in BACKENDS_HERE, reason="the native module is not built")
@pytest.mark.parametrize("isa", ["portable", "nonsense"])
def test_the_environment_forces_an_instruction_set(isa: str) -> None:
    code = """
import torch, convnest_kernels as c
from convnest_kernels import _extension
print(_extension.module.cpu.isa())
print(*c.explain(c.ops.gelu_layernorm, torch.randn(2, 3), None, None).reasons["cpu"])
"""
    result = run(code, CONVNEST_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr
    active, reasons = result.stdout.splitlines()
    if isa == "portable":
        assert active == "portable"
        assert not reasons
        assert not result.stderr
    else:
        expected = "CONVNEST_CPU_ISA=nonsense: isa must be one of"
        assert expected in reasons
        assert expected in result.stderr
