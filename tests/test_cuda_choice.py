"""Which calls "auto" leaves to Triton on an NVIDIA GPU: the rule, its reasons, its figures."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from bench import choice_model, predict, predict_choice
from convnest_kernels import backends, cuda
from convnest_kernels.backends import Call
from convnest_kernels.cuda import choice
from convnest_kernels.doctor import dispatch
from tests import emulation

emulated = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))

A100, RTX_4090 = (8, 0), (8, 9)
SLOWER = Call("nested_conv", "cuda", torch.float32, 576, 5, (128, 56, 56, 576))
FASTER = SLOWER._replace(dtype=torch.bfloat16)


@pytest.fixture
def both_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As on a machine with an RTX 4090 on which both backends run everything."""

    def on_gpus(call: Call) -> list[str]:
        return [] if call.device == "cuda" else ["it runs on GPUs"]

    for name in ("cuda", "triton"):
        monkeypatch.setattr(backends._package(name), "reasons_against", on_gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: RTX_4090)
    monkeypatch.setattr(cuda._host, "emulation", None)
    backends.select.cache_clear()
    yield monkeypatch
    backends.select.cache_clear()


def test_the_table_is_what_the_counts_on_file_predict() -> None:
    """Fails where counts, model or table have been changed alone: bench.predict_choice --count."""
    assert choice.read() == predict_choice.table()
    assert predict_choice.PAGE.read_text() == predict_choice.page()


@pytest.mark.parametrize("call", predict_choice.stage_calls(), ids=str)
def test_the_rule_takes_what_is_predicted_to_be_faster(call: choice_model.Call) -> None:
    """Worked out anew, from the ratio of each chip: a mean and no table."""
    dtype = torch.bfloat16 if call.dtype == "bf16" else torch.float32
    asked = Call(call.operator, "cuda", dtype, call.shape[-1], call.kernel_size or None, call.shape)
    for capability, chips in ((A100, predict.CHIPS[:4]), (RTX_4090, predict.CHIPS[4:])):
        alike = [
            other
            for other in predict_choice.stage_calls()
            if other[:3] == call[:3]
            and (choice_model.path(other) == "small map")
            == (choice_model.path(call) == "small map")
        ]
        logs = [math.log(predict_choice.ratio(o, c, True)) for o in alike for c in chips]
        slower = math.exp(sum(logs) / len(logs)) > 1.005
        assert (choice.reason_against(asked, capability) is not None) == slower


def test_reasons() -> None:
    ratio = choice.read()[choice.case_of(SLOWER, RTX_4090)]
    assert choice.reason_against(SLOWER, RTX_4090) == (
        f"predicted {ratio:.2f} times Triton's time: nested_conv, 5×5 in 32 bits, on graphics GPUs"
    )
    assert choice.reason_against(FASTER, RTX_4090) is None
    rows = Call("gelu_layernorm", "cuda", torch.float16, 576, None, (128, 56, 56, 576))
    reason = choice.reason_against(rows, (10, 0))
    assert reason is not None
    assert reason.endswith("Triton's time: gelu_layernorm in 16 bits, on data centre GPUs")
    # What was not predicted is left to the order of the backends.
    assert choice.reason_against(rows._replace(operator="another"), A100) is None


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.01])
def test_a_tie_is_the_cuda_backends(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    case = choice.case_of(SLOWER, RTX_4090)
    monkeypatch.setattr(choice, "read", lambda: {case: ratio})
    assert (choice.reason_against(SLOWER, RTX_4090) is None) == (ratio <= 1)


@pytest.mark.parametrize(
    ("capability", "gpus"),
    [
        ((8, 0), choice.DATA_CENTRE),
        ((9, 0), choice.DATA_CENTRE),
        ((10, 3), choice.DATA_CENTRE),
        ((8, 6), choice.GRAPHICS),
        ((8, 9), choice.GRAPHICS),
        ((12, 0), choice.GRAPHICS),
    ],
)
def test_kinds_of_gpus(capability: tuple[int, int], gpus: str) -> None:
    assert choice.gpus_of(capability) == gpus


def test_auto_goes_by_the_rule(both_run: pytest.MonkeyPatch) -> None:
    assert backends.select(SLOWER, "auto") == "triton"
    assert backends.select(FASTER, "auto") == "cuda"
    both_run.setattr(torch.cuda, "get_device_capability", lambda: A100)
    backends.select.cache_clear()
    assert backends.select(SLOWER, "auto") == "cuda"


def test_a_named_backend_never_looks_at_the_rule(both_run: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the rule was asked")

    both_run.setattr(choice, "reason_against", fail)
    assert backends.select(SLOWER, "cuda") == "cuda"
    assert backends.select(SLOWER, "triton") == "triton"
    with pytest.raises(AssertionError, match="the rule was asked"):
        backends.select(SLOWER, "auto")


def test_a_slower_kernel_is_better_than_none(both_run: pytest.MonkeyPatch) -> None:
    both_run.setattr(backends._package("triton"), "reasons_against", lambda call: ["too old"])
    assert backends.select(SLOWER, "auto") == "cuda"


def test_explain_and_doctor_show_the_reason(both_run: pytest.MonkeyPatch) -> None:
    explanation = backends.explain_call(SLOWER)
    assert explanation.backend == "triton"
    assert "  cuda    can run it; auto: predicted 1." in str(explanation)
    both_run.setattr(torch.cuda, "is_available", lambda: True)
    both_run.setattr(dispatch, "_SHAPE", (128, 56, 56, 576))
    lines = dispatch.show(dispatch.collect())
    (line,) = (line for line in lines if "nested_conv, 7×7 in 32 bits" in line)
    assert line.startswith("  auto passes over cuda: predicted 1.")
    assert line.endswith("[nested_conv float32]")


@emulated
def test_small_maps_are_those_of_the_kernels() -> None:
    of_the_core = emulation.library().takes_small_map
    sides, images = range(10), (0, 1, 2, 5, 16, 17, 128)
    for n, h, w, size in itertools.product(images, sides, sides, choice_model.KERNEL_SIZES):
        assert choice.takes_small_map(n, h, w, size) == bool(of_the_core(n, h, w, size))


def test_small_maps_need_vectors_and_16_bits() -> None:
    call = Call("nested_conv", "cuda", torch.bfloat16, 576, 7, (128, 7, 7, 576))
    assert choice.case_of(call, A100).small_map
    assert not choice.case_of(call._replace(dtype=torch.float32), A100).small_map
    assert not choice.case_of(call._replace(channels=575), A100).small_map


@emulated
@pytest.mark.parametrize("shape", [(128, 56, 56), (128, 7, 7), (3, 96, 130), (1, 1, 1), (5, 40, 3)])
@pytest.mark.parametrize("strips", [3, 4, 8])
@pytest.mark.parametrize("wanted", [1, 57, 400])
def test_strips_mirror_the_launches(shape: tuple[int, int, int], strips: int, wanted: int) -> None:
    found = (ctypes.c_int * 4)()
    emulation.library().fma_tiles(*shape, strips, wanted, found)
    per_image, beside, rows = choice_model.fma_tiles((*shape, 1), strips, wanted)
    assert [per_image, beside, len(rows)] == list(found)[:3]
    assert max(end - first for first, end in rows) == min(found[3], shape[1])
    assert sum(end - first for first, end in rows) * beside >= math.prod(shape[:2])


def test_a_kernel_takes_the_longest_of_its_terms() -> None:
    chip = predict.Chip("made up", "sm_90", 100, 1e9, 4e11, 512, 64)
    counts = {"fp32": 1.0, "alu": 0.5, "mufu": 0.5, "tensor": 0.25, "wavefronts": 0.125}
    terms = choice_model.terms(chip, choice_model.Kernel("", counts, 2), element=2)
    assert terms == {
        "memory": 1.0,  # 4 bytes at 4 to a clock and SM
        "issue": 2.25 / 4,
        "fp32": 0.5,
        "alu": 0.25,
        "mufu": 1.0,
        "tensor": 1.0,
        "shared": 0.125,
    }
    half = choice_model.Kernel("", {"fp32": 4.0}, 1)
    assert choice_model.clocks(chip, [half, half], element=2) == 4


def test_padding_is_paid_for() -> None:
    """A row of 6 vectors takes a warp: 32 lanes."""
    counts = choice_model.counts_on_file()["cuda"]["sm_80"]
    call = choice_model.Call("layernorm_residual", "bf16", 0, (128, 56, 56, 48))
    (kernel,) = choice_model.cuda_kernels(call, predict.CHIPS[0], False, "rows")
    of_a_lane = counts["row_statistics_kernel<BFloat16, false, (RowOutput)3, true>"]
    assert kernel.counts["fp32"] == pytest.approx(of_a_lane["fp32"] * 32 / 6)
    assert kernel.passes == 3
