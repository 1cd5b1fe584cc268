"""Peers beside torch: ONNX Runtime and OpenVINO, from an NCHW export; whether zentorch loads."""

from __future__ import annotations

import importlib
import importlib.util
import io
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.work import Work


class SkipError(Exception):
    """A contender does not take part, and why."""


@dataclass
class Prepared:
    """`call` is timed, `results` are checked; `module` and `forward` are for memory (torch only).

    `scope` is entered around every call; `checked_by_itself`: a network of its own, whose eager
    form is the truth; `others` are the same call on other copies of the inputs, taken in turn.
    """

    call: Callable[[], Any]
    results: Callable[[], dict[str, Tensor]]
    module: nn.Module | None = None
    forward: Callable[[], Tensor] | None = None
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    checked_by_itself: bool = False
    is_compiled: bool = False
    others: tuple[Callable[[], Any], ...] = ()


def _require(work: Work, *modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise SkipError(f"{' and '.join(missing)} not installed")
    if work.cell.mode == "train":
        raise SkipError("it does not train")
    if work.cell.device != "cpu":
        raise SkipError("compared on the CPU only")


def export(work: Work, module: nn.Module) -> bytes:
    """The NCHW form as float32 ONNX, with the cell's shapes fixed."""
    inputs = tuple(x.detach().float().contiguous() for x in work.inputs)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.float().eval(),
            inputs,
            dynamo=True,
            opset_version=20,
            input_names=[f"input{i}" for i in range(len(inputs))],
            verbose=False,
        )
    assert program is not None
    program.save(file)
    return file.getvalue()


def _float32_copy(work: Work) -> nn.Module:
    import copy

    return copy.deepcopy(work.forms["nchw"]).float()


def onnxruntime(work: Work) -> Prepared:
    """Its CPU provider, all optimisations."""
    _require(work, "onnxruntime", "onnxscript")
    if work.cell.dtype != "float32":
        raise SkipError(f"its CPU kernels have no {work.cell.dtype} convolution")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = work.cell.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Its threads may spin while it runs, as they do by default, but not while others are timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(
        export(work, _float32_copy(work)), options, providers=["CPUExecutionProvider"]
    )
    feed = {f"input{i}": x.detach().contiguous().numpy() for i, x in enumerate(work.inputs)}

    def call() -> Any:
        return session.run(None, feed)

    return Prepared(call, lambda: {"output": torch.from_numpy(call()[0])})


def openvino(work: Work) -> Prepared:
    """Its CPU plugin, told the cell's precision."""
    _require(work, "openvino", "onnxscript")
    precision = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[work.cell.dtype]
    import openvino as ov

    core = ov.Core()
    network = core.read_model(io.BytesIO(export(work, _float32_copy(work))))
    options = {
        "INFERENCE_NUM_THREADS": str(work.cell.threads),
        "NUM_STREAMS": "1",
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": "NO",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(network, "CPU", options).create_infer_request()
    feed = [x.detach().float().contiguous().numpy() for x in work.inputs]

    def call() -> Any:
        return request.infer(feed, share_inputs=True, share_outputs=True)

    return Prepared(call, lambda: {"output": torch.from_numpy(call()[0].copy())})


def import_zentorch() -> None:
    """It registers itself as a backend of torch.compile; raises SkipError where it cannot."""
    if importlib.util.find_spec("zentorch") is None:
        raise SkipError("zentorch not installed")
    try:
        importlib.import_module("zentorch")
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise SkipError(f"zentorch does not load in torch {torch.__version__}: {reason}") from error
