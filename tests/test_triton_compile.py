"""The Triton kernels through the real compiler, without a GPU, and what decides a recompilation.

Kernels are either interpreted or compiled in a process, so these tests run in one of their own:
here, one test starts it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import triton_interpreter

ROOT = Path(__file__).parents[1]

if not triton_interpreter.compiles:

    @pytest.mark.skipif(not triton_interpreter.available, reason="needs Triton, and no GPU")
    def test_compilation_in_a_process_of_its_own() -> None:
        environment = os.environ | {"CONVNEST_TEST_COMPILE": "1"}
        del environment["TRITON_INTERPRET"]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr

else:
    from convnest_kernels.triton import aot, aot_report, autotune, heuristics, nested_conv

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

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("arch", aot_report.ARCHITECTURES)
    def test_kernels_stay_within_their_budgets(arch: str, dtype: torch.dtype) -> None:
        """No spills, within shared memory, at least one program a multiprocessor."""
        if dtype == torch.float32 and arch not in ("90", "gfx942"):
            pytest.skip("the FMA form compiles for 10 s: two architectures stand for it")
        for launch in aot_report.model_launches(arch, [dtype], widths=[(56, 56)]):
            report = aot.compile_report(launch, arch)
            assert not report.faults, report
            if arch != "gfx942" and "matrix" in report.kernel:
                mix = aot.loop_mix(aot.compile_launch(launch, arch).asm["cubin"])
                assert mix["HMMA"] == (14 if "fwd" in report.kernel else 7 * 2), mix
                assert not mix["LDL"] and not mix["STL"], mix

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

    def test_tuning_keeps_the_fastest_tile_that_fits() -> None:
        import triton

        tile = heuristics.conv_tile(7, torch.bfloat16, "90", backward=True)
        tiles = autotune.candidates(tile)
        assert tiles[0] == tile and len(set(tiles)) == len(tiles) > 1

        def launch(candidate: heuristics.ConvTile) -> float:
            if candidate == tiles[-1]:
                raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")
            return float(candidate == tile)

        assert autotune.fastest(tiles, launch, lambda run: run()) == tiles[1]  # type: ignore[arg-type,return-value]

    def test_tuned_tiles_survive_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CONVNEST_CACHE_DIR", str(tmp_path))
        tile = heuristics.conv_tile(7, torch.bfloat16, "90", backward=False)
        path = autotune.cache_path("NVIDIA H100/1-12080")
        assert path.parent == tmp_path
        autotune._write(path, "first", tile)
        autotune._write(path, "second", replace(tile, num_warps=8))
        autotune._read.cache_clear()
        assert autotune._read(path) == {"first": tile, "second": replace(tile, num_warps=8)}
        path.write_text(path.read_text()[:20])
        autotune._read.cache_clear()
        assert autotune._read(path) == {}

    def test_every_candidate_compiles() -> None:
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
                assert aot.compile_report(tuned, "90").occupancy > 0, candidate
