"""The Triton kernels through the real compiler, without a GPU, and what decides a recompilation.

Kernels are either interpreted or compiled in a process, so these tests run in one of their own:
here, one test starts it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import triton_interpreter

ROOT = Path(__file__).parents[1]

if not triton_interpreter.compiles:

    @pytest.mark.skipif(not triton_interpreter.available, reason="needs Triton, and no GPU")
    def test_compilation_in_a_process_of_its_own() -> None:
        environment = os.environ | {"CONVNEST_TEST_COMPILE": "1"}
        del environment["TRITON_INTERPRET"]
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
        run = subprocess.run(
            [*command, __file__], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout + run.stderr

else:
    from triton.runtime.jit import JITFunction

    from bench import triton_report
    from convnest_kernels import backends
    from convnest_kernels.models import create_model
    from convnest_kernels.triton import (
        _launch,
        aot,
        aot_table,
        autotune,
        dwconv_gelu_layernorm,
        gelu_layernorm,
        heuristics,
        layernorm_residual,
        nested_conv,
    )

    TABLE = aot_table.read()
    STAGE = (48, 56, False)
    AGAIN = "python -m bench.triton_report brings the table up to date"

    def launches(*shape: int, dtype: torch.dtype = torch.bfloat16) -> list[aot.Launch]:
        """What nested_conv launches, forward and backward, on [N, H, W, C]."""
        channels = shape[-1]
        h = torch.empty(shape, dtype=dtype, device="meta")
        vector = torch.empty(channels, device="meta")
        parameters = (vector.new_empty(channels, 1, 7, 7), vector, vector, vector)
        with aot.record("90") as found:
            v, *kept = nested_conv.forward(h, *parameters, 1e-6, True, True)
            nested_conv.backward(v, h, *kept, *parameters, 1e-6, True, [True] * 5)
        return found

    # The committed table.

    @pytest.mark.parametrize("arch", aot_table.ARCHITECTURES)
    def test_table_is_that_of_todays_heuristics_and_kernels(arch: str) -> None:
        today = {
            (launch.digest, aot.source_digest(launch.kernel))
            for launch in triton_report.model_launches(arch)
        }
        rows = [(row.launch, row.source) for row in TABLE if row.arch == arch]
        assert len(rows) == len(set(rows)) > 400
        assert set(rows) == today, AGAIN

    def test_table_is_within_its_budgets() -> None:
        assert {row.arch for row in TABLE} == set(aot_table.ARCHITECTURES)
        assert [(row, fault) for row in TABLE for fault in row.faults] == []

    def test_summary_is_that_of_the_table() -> None:
        written = (triton_report.RESULTS / "triton_kernels.md").read_text()
        assert written == triton_report.summary_page(TABLE), AGAIN

    @pytest.mark.parametrize(
        ("excess", "word"),
        [({"spills": 4}, "spills"), ({"shared": 2**18}, "shared"), ({"occupancy": 0}, "occupancy")],
        ids=str,
    )
    def test_a_budget_that_is_exceeded_is_a_fault(excess: dict[str, int], word: str) -> None:
        (fault,) = replace(TABLE[0], **excess).faults  # type: ignore[arg-type]
        assert word in fault

    def test_a_changed_kernel_or_launch_is_seen() -> None:
        launch = launches(8, 14, 14, 576)[0]
        assert replace(launch, options=(("num_warps", 16),)).digest != launch.digest
        lines = "def f(x):\n    # why\n    if x:\n        x += 1\n    return x\n"
        code = aot._code(lines)
        assert aot._code(lines.replace("# why", '"""Doc."""').replace("x += 1", "x  +=  1")) == code
        assert aot._code(lines.replace("x += 1", "x += 2")) != code
        assert aot._code(lines.replace("    return", "        return")) != code

    class OnTriton(TorchDispatchMode):
        """Runs the registered operators of a model on the host functions of this backend."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            if func.namespace == "convnest":
                name = func._schema.name.removeprefix("convnest::")
                stem, direction = name.rsplit("_", 1)
                module = importlib.import_module(f"convnest_kernels.triton.{stem}")
                getattr(module, direction)(*args[:-1])  # but for the backend's name
            return func(*args, **(kwargs or {}))

    @pytest.mark.parametrize("name", ["convnest_nano", "convnest_iso_femto"])
    def test_table_holds_what_the_models_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "select", lambda call, requested: "triton")
        known = set(triton_report.model_launches("90"))
        seen = set()
        for dtype in (torch.float32, torch.bfloat16):
            for training in (True, False):
                model = create_model(name, backend="triton").to("meta").train(training)
                with aot.record("90") as found, OnTriton(), torch.autocast("cpu", enabled=False):
                    x = torch.empty(2, 3, 224, 224, device="meta")
                    for stage in model.stages:
                        x = model.stem(x) if x.shape[1] == 3 else x
                        x = stage.downsample(x)
                        block = stage.blocks[0]
                        low = x.detach().to(dtype).requires_grad_(training)
                        with torch.set_grad_enabled(training):
                            y = _block(block, low)
                            if training:
                                y.sum().backward()
                        x = y.detach().float()
                assert len(found) >= (7 if training else 3)
                seen |= set(found)
        assert seen <= known, [launch for launch in seen if launch not in known]

    def _block(block: Any, x: torch.Tensor) -> torch.Tensor:
        """The block in a low dtype, its norms and convolution in float32, as autocast leaves it."""
        for layer in (block.mlp.fc1, block.mlp.fc2):
            layer.to(x.dtype)
        y = block(x)
        assert isinstance(y, torch.Tensor)
        return y

    # A sample, compiled here and now.

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("arch", aot_table.ARCHITECTURES)
    def test_a_sample_compiles_to_what_the_table_says(arch: str, dtype: torch.dtype) -> None:
        if dtype == torch.float32 and arch not in ("90", "gfx942"):
            pytest.skip("the FMA form compiles for 10 s: two architectures stand for it")
        known = {(row.arch, row.launch): row for row in TABLE}
        for launch in triton_report.stage_launches(arch, dtype, STAGE):
            if dict(launch.constexprs).get("STORE_SUM") is False:
                continue  # inference: the same kernel with one store less
            row = aot.report(launch, arch)
            assert not row.faults, row
            if row.triton == TABLE[0].triton:
                assert row == known[arch, launch.digest], AGAIN
            if arch != "gfx942" and "matrix" in row.kernel:
                mix = aot.loop_mix(aot.compile_launch(launch, arch).asm["cubin"])
                assert mix["HMMA"] == (14 if "fwd" in row.kernel else 7 * 2), mix
                assert not mix["LDL"] and not mix["STL"], mix

    def test_kernels_with_64_bit_offsets_fit() -> None:
        for launch in launches(8, 56, 56, 576):
            constexprs = dict(launch.constexprs)
            if "INT64" in constexprs:
                wide = tuple((constexprs | {"INT64": True}).items())
                row = aot.report(replace(launch, constexprs=wide), "90")
                assert row.occupancy > 0 and row.spills <= 64, row

    # What decides a compilation.

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_a_new_size_compiles_nothing(dtype: torch.dtype) -> None:
        expected = launches(8, 56, 56, 576, dtype=dtype)
        for shape in ((1, 56, 56), (128, 7, 7), (3, 31, 57), (16, 16, 16), (1, 1, 1)):
            assert set(launches(*shape, 576, dtype=dtype)) <= set(expected), shape

    def test_64_bit_offsets_where_sizes_need_them() -> None:
        def wide(shape: tuple[int, ...]) -> set[bool]:
            flags = (dict(launch.constexprs).get("INT64") for launch in launches(*shape))
            return {flag for flag in flags if flag is not None}

        assert wide((128, 56, 56, 1152)) == {False}
        assert wide((2**10, 56, 56, 1152)) == {True}

    # The host functions: where they run, what they allocate, whether they wait.

    def run_everything(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> None:
        """Forward and backward of every operator on meta tensors, where a host sync is an error."""
        channels = shape[-1]
        x, y, t = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(3))
        v = torch.empty(channels, device="meta")
        conv = (torch.empty(channels, 1, 7, 7, device="meta"), v, v, v)
        _, *kept = nested_conv.forward(x, *conv, 1e-6, True, True)
        nested_conv.backward(y, x, *kept, *conv, 1e-6, True, [True] * 5)
        _, *kept = dwconv_gelu_layernorm.forward(x, *conv, 1e-6, "gelu", False, True)
        dwconv_gelu_layernorm.backward(y, x, *kept, *conv, 1e-6, "gelu", False, [True] * 5)
        _, *kept = gelu_layernorm.forward(x, v, v, 1e-6, False, True)
        gelu_layernorm.backward(y, x, *kept, v, v, 1e-6, False, [True] * 3)
        _, *kept = layernorm_residual.forward(t, x, v, v, v, 1e-6, True)
        layernorm_residual.backward(y, t, x, *kept, v, v, v, 1e-6, [True] * 5)

    class Operations(TorchDispatchMode):
        """The names of torch's operators, and the bytes that they allocate."""

        def __init__(self) -> None:
            super().__init__()
            self.names: set[str] = set()
            self.bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            name = func._schema.name.removeprefix("aten::")
            self.names.add(name)
            if "empty" in name:
                self.bytes += result.numel() * result.element_size()
            return result

    def test_no_host_synchronisation_and_no_foreign_memory() -> None:
        """Nothing but torch's allocator and views: what a CUDA graph can capture."""
        with aot.record("90"), Operations() as operations:
            run_everything((4, 14, 14, 576))
        allocations = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
        views = {"detach", "view", "_unsafe_view", "alias", "reshape", "_reshape_alias"}
        assert operations.names <= allocations | views, operations.names
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.empty(1, device="meta").item()

    def test_every_launch_is_under_the_guard_of_its_tensors_gpu(
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Triton launches on the current GPU, so the tensor's must be current; and it is again."""
        entered: list[torch.device] = []

        @contextlib.contextmanager
        def guard(device: torch.device) -> Iterator[None]:
            entered.append(device)
            yield
            assert entered.pop() == device

        class OnSecondGPU:
            is_cuda, device = True, torch.device("cuda:1")

        monkeypatch.setattr(torch.cuda, "device", guard)
        with _launch.device_of(OnSecondGPU()):  # type: ignore[arg-type]
            assert entered == [torch.device("cuda:1")]
        assert not entered
        monkeypatch.setattr(_launch, "device_of", lambda x: guard(x.device))
        unguarded, count = [], 0
        with aot.record("90"):
            recorded = JITFunction.run

            def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if entered != [torch.device("meta")]:
                    unguarded.append(kernel.fn.__name__)
                return recorded(kernel, *args, **kwargs)

            JITFunction.run = run
            run_everything((2, 7, 7, 96))
        assert count > 10 and not unguarded

    @pytest.mark.parametrize(
        "shape",
        [(128, 56, 56, 576), (128, 7, 7, 4608), (8, 224, 224, 96), (1, 7, 7, 6912)],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_workspace_is_what_the_documentation_says(
        shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        n, h, w, channels = shape
        pixels, taps = n * h * w, 49
        x, dy = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(2))
        v = torch.empty(channels, device="meta")
        parameters = (torch.empty(channels, 1, 7, 7, device="meta"), v, v, v)
        wide = x.numel() * x.element_size()
        tile = heuristics.conv_tile(7, dtype, "90", backward=True)
        blocks = -(-channels // tile.block_c)

        with aot.record("90"), Operations() as forward:
            _, *kept = nested_conv.forward(x, *parameters, 1e-6, True, False)
        assert forward.bytes - wide <= 8 * pixels
        with aot.record("90"):
            _, *kept = nested_conv.forward(x, *parameters, 1e-6, True, True)
        with aot.record("90"), Operations() as backward:
            nested_conv.backward(dy, x, *kept, *parameters, 1e-6, True, [True] * 5)
        results = wide + 4 * channels * (taps + 3)
        row_sums = 8 * pixels * blocks
        partials = 4 * (1024 + blocks) * tile.block_c * (taps + 3)
        assert backward.bytes - results <= row_sums + partials

        with aot.record("90"):
            _, *kept = gelu_layernorm.forward(x, v, v, 1e-6, False, True)
        with aot.record("90"), Operations() as backward:
            gelu_layernorm.backward(dy, x, *kept, v, v, 1e-6, False, [True] * 3)
        assert backward.bytes - wide - 8 * channels <= max(12 << 20, 192 * 64 * channels)

    def test_partials_are_bounded() -> None:
        for channels in (20, 576, 6912, 32768):
            tile = heuristics.row_tile(channels, 4)
            programs = heuristics.row_programs(2**24, tile.block_r, channels)
            assert programs * channels * 4 <= max(4 << 20, 64 * channels * 4)
            for block_c in (8, 64):
                blocks = -(-channels // block_c)
                chunks = heuristics.conv_chunks(10**6, blocks)
                assert chunks * blocks < 1024 + blocks

    @pytest.mark.parametrize("channels", [1, 7, 20, 240, 576, 1056, 1872, 6912, 32768])
    def test_rows_are_not_padded_to_a_power_of_two(channels: int) -> None:
        tile = heuristics.row_tile(channels, 1)
        padded = tile.block_c * tile.n_blocks
        assert channels <= padded <= max(16, 1.125 * channels, channels + 15)
        assert tile.n_blocks <= 32

    def test_every_candidate_of_the_tuning_compiles() -> None:
        h = torch.empty(8, 14, 14, 576, dtype=torch.bfloat16, device="meta")
        found = [launch for launch in launches(*h.shape) if "matrix" in launch.kernel]
        for launch, backward in zip(found, (False, True), strict=True):
            tile = heuristics.conv_tile(7, torch.bfloat16, "90", backward)
            for candidate in autotune.candidates(tile):
                constexprs = dict(launch.constexprs) | {"BLOCK_C": candidate.block_c}
                tuned = replace(
                    launch,
                    constexprs=tuple(constexprs.items()),
                    options=tuple(candidate.options.items()),
                )
                assert aot.report(tuned, "90").occupancy > 0, candidate
