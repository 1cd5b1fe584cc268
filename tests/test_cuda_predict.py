"""The prediction's own model: it cuts the canvas as the launches do."""

from __future__ import annotations

import ctypes

import pytest

from bench import predict, predict_backward, predict_small
from tests import emulation


@pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))
@pytest.mark.parametrize("halo_rows", [0, 3])
@pytest.mark.parametrize("wanted", [1, 8, 57, 400])
@pytest.mark.parametrize(
    "shape", [(128, 56, 56), (128, 28, 28), (128, 14, 14), (128, 7, 7), (3, 96, 130), (1, 1, 1)]
)
def test_canvas_efficiency_mirrors_the_launches(shape, wanted, halo_rows):
    of_the_core = emulation.library().canvas_efficiency
    of_the_core.restype = ctypes.c_double
    mine = predict.canvas_efficiency(*shape, 3, wanted, halo_rows)
    assert mine == pytest.approx(of_the_core(*shape, 3, wanted, halo_rows), rel=1e-12)
    assert 0 < mine <= 1
    if halo_rows == 0:
        of_the_core = emulation.library().fused_efficiency
        of_the_core.restype = ctypes.c_double
        mine = predict_backward.fused_efficiency(*shape, 3, wanted)
        assert mine == pytest.approx(of_the_core(*shape, wanted), rel=1e-12)
        assert 0 < mine <= 1


def test_pipes_of_an_instruction_mix():
    assert predict.pipe("FFMA.FTZ") == "fp32"
    assert predict.pipe("HMMA.16816.F32.BF16") == "tensor"
    assert predict.pipe("LDSM.16.MT88.4") == "memory"
    assert predict.pipe("FMNMX") == "alu"


def test_a_chip_with_endless_bandwidth_is_not_bound_by_memory():
    chip = predict.Chip("fast", "sm_90", 100, 1e9, 1e18, 1024, 128)
    mix = predict.collections.Counter({"FFMA": 600, "HMMA.16816": 56, "LDS": 60})
    terms = predict.predict(chip, predict.CONVOLUTIONS[0], mix, 56, 576)
    assert terms["memory"] < 1e-6 < terms["issue"]
    assert terms["issue"] == pytest.approx(716 / 4 / 1024 / (56 * 56 * 2 / (59 + 1) / 128), rel=0.1)


def test_the_fma_kernels_bound_is_their_products():
    chip = predict.Chip("fast", "sm_90", 100, 1e9, 1e18, 1024, 64)
    forward = predict.FMA_CONVOLUTIONS[0]
    terms = predict.predict_fma(
        chip, forward, predict.collections.Counter({"FFMA": 343, "LDS": 13})
    )
    assert terms["fp32"] == pytest.approx(49 / 64)
    assert terms["issue"] == pytest.approx(356 / 7 / 128)
    assert terms["memory"] < 1e-6


def test_small_maps_are_counted_by_the_tile():
    chip = predict.Chip("fast", "sm_90", 100, 1e9, 1e18, 1024, 64)
    forward = predict_small.SMALL_MAPS[2]
    mix = predict.collections.Counter({"HMMA.16816.F32.BF16": 44, "PRMT": 56, "LDS": 28})
    terms = predict_small.predict_small(chip, forward, mix)
    tile = 16 * 16 * 49
    assert terms["issue"] == pytest.approx(8 * 128 / tile / 4)
    assert terms["tensor"] == pytest.approx(8 * 44 * 2048 / tile / 1024)
    assert terms["alu"] == pytest.approx(8 * 56 * 32 / tile / 64)
    # Fill 256, windows 256, bands 64 + 224, outputs 224, drain 224
    assert terms["shared"] == pytest.approx(1248 / tile)
    assert terms["memory"] < 1e-6
