"""The CUDA kernels through the public operators and the real build's bindings, on the emulation.

Every launch is checked for races, accesses out of bounds and reads of what nothing wrote
(emulation/checked_memory.h); what a kernel fails to write is NaN (conftest.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bench.cases import CASES, CONV_OPERATORS, OPERATORS, Case, make_inputs
from convnest_kernels import BackendError, backends, cuda, explain, ops
from convnest_kernels.backends import Call
from convnest_kernels.cuda import _host
from tests import emulation
from tests.test_operators import check, check_each_gradient_alone, output_and_gradients

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))

# Operators with kernels, and the dtypes they have them for.
PAIRS = [(operator, dtype) for operator in OPERATORS for dtype in cuda.DTYPES.get(operator, ())]
each_pair = pytest.mark.parametrize(("operator", "dtype"), PAIRS)
each_operator = pytest.mark.parametrize("operator", list(dict(PAIRS)))


@pytest.fixture(autouse=True)
def emulated() -> Iterator[emulation.Backend]:
    with emulation.backend() as backend:
        yield backend


def _call(case: Case, dtype: torch.dtype) -> Call:
    kernel_size = case.kernel_size if case.operator in CONV_OPERATORS else None
    return Call(case.operator, "cpu", dtype, case.shape[-1], kernel_size, case.shape)


def _cases() -> list[object]:
    """Every case of the table that there are kernels for; the longest only where asked for."""
    found = []
    for case in CASES:
        for dtype in cuda.DTYPES.get(case.operator, ()):
            if cuda._reasons_against_kernel(_call(case, dtype)):
                continue
            pixels = math.prod(case.shape)
            marks = [pytest.mark.slow] if pixels > 20_000 and dtype == torch.float16 else []
            name = f"{case}-{str(dtype).removeprefix('torch.')}"
            found.append(pytest.param(case, dtype, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("case", "dtype"), _cases())
def test_output_and_gradients(case: Case, dtype: torch.dtype, emulated: emulation.Backend) -> None:
    check(case, make_inputs(case, dtype), "cuda")
    assert emulated.launches == 2


@pytest.mark.parametrize("options", [(), (("norm_first", True),)], ids=["", "norm_first"])
@pytest.mark.parametrize("channels", [4608, 8192, 4101])
def test_wide_rows(channels: int, options: tuple[tuple[str, bool], ...]) -> None:
    """Two vectors of a row to a thread; of floats, what is needed last is read twice."""
    for dtype in (torch.float32, torch.bfloat16):
        case = Case("gelu_layernorm", (3, channels), options=options)
        check(case, make_inputs(case, dtype), "cuda")
        if not options:
            case = Case("layernorm_residual", (3, channels))
            check(case, make_inputs(case, dtype), "cuda")


@pytest.mark.parametrize(
    ("operator", "dtype"), [pair for pair in PAIRS if pair[1] != torch.float32]
)
def test_float32_parameters_beside_low_precision_activations(
    operator: str, dtype: torch.dtype
) -> None:
    case = Case(operator, (2, 3, 9, 50))
    check(case, make_inputs(case, dtype, parameter_dtype=torch.float32), "cuda")


@each_pair
def test_same_bits_for_every_order_of_threads(
    operator: str, dtype: torch.dtype, emulated: emulation.Backend
) -> None:
    case = Case(operator, (3, 4, 5, 50))
    inputs = make_inputs(case, dtype)
    results = []
    for seed in (0, 1, 2, 2):
        emulated.seed = seed
        results.append(output_and_gradients(case.function, inputs, backend="cuda"))
    for other in results[1:]:
        for name, tensor in other.items():
            assert torch.equal(tensor, results[0][name]), name


@each_pair
def test_only_the_gradients_asked_for(operator: str, dtype: torch.dtype) -> None:
    case = Case(operator, (2, 3, 4, 12), kernel_size=3)
    check_each_gradient_alone(case, make_inputs(case, dtype), "cuda")


@each_pair
def test_forward_alone_is_forward_with_gradients(operator: str, dtype: torch.dtype) -> None:
    case = Case(operator, (2, 4, 5, 24))
    inputs = make_inputs(case, dtype)
    kept = case.function(*inputs.args, backend="cuda")
    with torch.no_grad():
        alone = case.function(*inputs.args, backend="cuda")
    assert torch.equal(kept, alone)


def shifted(x: Tensor) -> Tensor:
    """The same values, one element off any alignment."""
    view = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x.detach())
    assert view.data_ptr() % 16 != 0 and view.is_contiguous()
    return view.requires_grad_(x.requires_grad)


@each_pair
def test_unaligned_views(operator: str, dtype: torch.dtype) -> None:
    """Contiguous views that no 16-byte access may touch: the same bits by narrower ones."""
    case = Case(operator, (1, 4, 7, 16))
    inputs = make_inputs(case, dtype)
    with emulation.device(96 * 1024):  # where nested_conv's backward runs in three kernels, too
        aligned = output_and_gradients(case.function, inputs, backend="cuda")
    for name, x in inputs.tensors.items():
        assert x is not None
        inputs.tensors[name] = shifted(x)
    inputs.dy.set_(shifted(inputs.dy))
    unaligned = output_and_gradients(case.function, inputs, backend="cuda")
    for name, tensor in unaligned.items():
        assert torch.equal(tensor, aligned[name]), name


@each_operator
@pytest.mark.parametrize("shape", [(0, 5, 6, 12), (2, 0, 6, 12), (2, 5, 0, 12)])
def test_empty_batch(operator: str, shape: tuple[int, ...], emulated: emulation.Backend) -> None:
    case = Case(operator, shape)
    inputs = make_inputs(case, torch.bfloat16)
    results = output_and_gradients(case.function, inputs, backend="cuda")
    assert results.pop("y").shape == shape
    for name, grad in results.items():
        assert (grad == 0).all(), name
    assert emulated.launches == 0


@each_operator
def test_gradients_have_the_strides_of_their_inputs(operator: str) -> None:
    case = Case(operator, (2, 6, 5, 24), layout="channels_first")
    inputs = make_inputs(case, torch.bfloat16)
    results = output_and_gradients(case.function, inputs, backend="cuda")
    for name, tensor in inputs.tensors.items():
        assert tensor is not None
        assert results[f"d{name}"].stride() == tensor.stride(), name


@each_operator
def test_compiled(operator: str) -> None:
    case = Case(operator, (2, 3, 4, 20))
    inputs = make_inputs(case, torch.bfloat16)

    def run(*args: Tensor) -> Tensor:
        return case.function(*args, backend="cuda")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = output_and_gradients(run, inputs)
    found = output_and_gradients(compiled, inputs)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@each_operator
def test_opcheck(operator: str) -> None:
    case = Case(operator, (2, 3, 4, 24))
    args = [x if x is None else x.detach() for x in make_inputs(case, torch.bfloat16).args]
    options: dict[str, tuple[object, ...]] = {"nested_conv": (1e-6, True, True, "cuda")}
    options["gelu_layernorm"] = (1e-6, False, True, "cuda")
    options["layernorm_residual"] = (1e-6, True, "cuda")
    options["dwconv_gelu_layernorm"] = (1e-6, "gelu", False, True, "cuda")
    overload = getattr(torch.ops.convnest, f"{operator}_forward").default
    torch.library.opcheck(overload, (*args, *options[operator]))


@each_operator
def test_autocast(operator: str) -> None:
    case = Case(operator, (2, 3, 4, 24))
    inputs = make_inputs(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = case.function(*inputs.args, backend="cuda")
    low = [
        x.to(torch.bfloat16) if x is not None and x.shape == case.shape else x for x in inputs.args
    ]
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, case.function(*low, backend="cuda"))
    grads = torch.autograd.grad(y, inputs.wanted, inputs.dy.to(y.dtype))
    assert {grad.dtype for grad in grads} == {torch.float32}


def test_a_fault_of_a_kernel_is_a_python_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a launch was not given: the emulation's report arrives as an exception."""
    monkeypatch.setattr(emulation.Backend, "watch", lambda self, *_: emulation.configure())
    inputs = make_inputs(Case("gelu_layernorm", (3, 16)), torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"global memory out of bounds.*gelu_layernorm_fwd"):
        ops.gelu_layernorm(*inputs.args, backend="cuda")


@pytest.mark.parametrize(
    ("case", "dtype", "reason"),
    [
        (Case("nested_conv", (1, 3, 3, 8), kernel_size=15), torch.bfloat16, "kernel sizes are"),
        (Case("nested_conv", (1, 3, 3, 8)), torch.float64, "no kernel for torch.float64"),
        (Case("gelu_layernorm", (3, 8200)), torch.float16, "rows of up to 8192 channels, got 8200"),
        (Case("gelu_layernorm", (3, 8)), torch.float64, "no kernel for torch.float64"),
    ],
    ids=str,
)
def test_what_has_no_kernel_is_refused_by_name(case: Case, dtype: torch.dtype, reason: str) -> None:
    inputs = make_inputs(case, dtype)
    assert reason in "; ".join(explain(case.function, *inputs.args).reasons["cuda"])
    with pytest.raises(BackendError, match=reason):
        case.function(*inputs.args, backend="cuda")


def test_too_many_pixels_are_refused() -> None:
    call = Call("nested_conv", "cpu", torch.bfloat16, 8, 7, (2, 2**15, 2**15, 8))
    assert backends.reasons_against("cuda", call) == ["it counts pixels in 31 bits, got 2147483648"]
    assert not backends.reasons_against("cuda", call._replace(shape=(2, 2**15, 2**15 - 1, 8)))


def test_the_core_refuses_what_the_reasons_say() -> None:
    """The limits are told twice, here and in the core; this holds them together."""
    core = emulation.module()

    def workspace(*numbers: int) -> int:
        return core.nested_conv_backward_workspace(0, 0, 0, 0, *numbers)

    for size in range(1, 16):
        if size in cuda.KERNEL_SIZES["nested_conv"]:
            workspace(1, 4, 4, 8, size, 2)
        else:
            with pytest.raises(ValueError, match="kernel_size must be"):
                workspace(1, 4, 4, 8, size, 2)
    workspace(1, 1, 1, cuda.MAX_CHANNELS, 7, 2)
    with pytest.raises(ValueError, match="C must be at most 8192, got 8193"):
        workspace(1, 1, 1, cuda.MAX_CHANNELS + 1, 7, 2)
    with pytest.raises(ValueError, match=r"N·H·W must be below 2\^31, got 2147483648"):
        workspace(2, 2**15, 2**15, 8, 7, 2)
    with pytest.raises(ValueError, match=r"N must be from 0 to 2\^31 - 1, got 2147483648"):
        workspace(2**31, 1, 1, 8, 7, 2)


def test_auto_never_takes_the_emulation() -> None:
    inputs = make_inputs(Case("gelu_layernorm", (3, 8)), torch.bfloat16)
    explanation = explain(ops.gelu_layernorm, *inputs.args)
    assert explanation.reasons["cuda"] == [] and explanation.backend != "cuda"


def test_without_the_emulation_cpu_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_host, "emulation", None)
    backends.select.cache_clear()
    inputs = make_inputs(Case("gelu_layernorm", (3, 8)), torch.bfloat16)
    with pytest.raises(BackendError, match="it runs on CUDA tensors, got cpu"):
        ops.gelu_layernorm(*inputs.args, backend="cuda")


@pytest.mark.parametrize(
    ("capability", "archs", "refused"),
    [
        ((7, 5), [80, 90], "needs compute capability 8.0 or newer, a GPU here has 7.5"),
        ((8, 0), [80, 90], None),
        ((8, 9), [80, 90], None),  # of one generation
        ((8, 0), [86, 90], "built for compute capability 8.6, 9.0, a GPU here has 8.0"),
        ((9, 0), [80, 100], "built for compute capability 8.0, 10.0, a GPU here has 9.0"),
        ((10, 3), [80, 90, 100], None),
        ((12, 0), [80, 90], None),  # from PTX
        ((11, 0), [80, 90, 100, 120], "a GPU here has 11.0"),
    ],
)
def test_capabilities(capability: tuple[int, int], archs: list[int], refused: str | None) -> None:
    reason = cuda.reason_against_capability(capability, archs)
    assert (reason is None) == (refused is None)
    assert refused is None or refused in str(reason)


class TestMachine:
    """Reasons on machines that this one is not."""

    CALL = Call("gelu_layernorm", "cuda", torch.bfloat16, 64, None, (8, 64))

    @pytest.fixture(autouse=True)
    def machine(self, emulated: emulation.Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_host, "emulation", None)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        uncached = cuda._reasons_against_gpus.__wrapped__
        monkeypatch.setattr(cuda, "_reasons_against_gpus", uncached)
        self.pretend(monkeypatch)

    def pretend(self, monkeypatch: pytest.MonkeyPatch, driver: int = 13000, **info: object) -> None:
        class Core:
            runtime_version = staticmethod(lambda: 13000)
            driver_version = staticmethod(lambda: driver)

        class Module:
            cuda = Core
            build_info = staticmethod(
                lambda: {"cuda": "13.0", "cuda_archs": ["80", "90"], "cuda_reason": ""} | info
            )

        monkeypatch.setattr("convnest_kernels._extension.module", Module)

    def test_a_machine_that_fits(self) -> None:
        assert backends.reasons_against("cuda", self.CALL) == []

    def test_built_without_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pretend(monkeypatch, cuda="", cuda_reason="nvcc was not found")
        assert backends.reasons_against("cuda", self.CALL) == [
            "the native module was built without CUDA kernels (nvcc was not found)"
        ]

    def test_no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        (reason,) = backends.reasons_against("cuda", self.CALL)
        assert reason.startswith("torch sees no GPU")

    def test_rocm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "hip", "6.4")
        (reason,) = backends.reasons_against("cuda", self.CALL)
        assert reason == "it runs on NVIDIA GPUs, this torch is built for ROCm"

    def test_old_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
        (reason,) = backends.reasons_against("cuda", self.CALL)
        assert reason == "it needs compute capability 8.0 or newer, a GPU here has 7.0"

    def test_old_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pretend(monkeypatch, driver=12080)
        (reason,) = backends.reasons_against("cuda", self.CALL)
        assert reason == "it was built with CUDA 13.0, the driver runs CUDA 12.8"

    def test_every_reason_at_once(self) -> None:
        call = self.CALL._replace(device="cpu", dtype=torch.float64, channels=9000)
        assert len(backends.reasons_against("cuda", call)) == 3
