"""The emulation itself: it computes what CUDA's documents say, and it sees planted faults."""

from __future__ import annotations

import pytest
import torch

from tests import emulation

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))

# In the order of `Plant` in planted_faults.cu, with what the report must say.
PLANTS = [
    ("nothing", None),
    ("missing_barrier", "race in shared memory, a barrier is missing|no thread wrote"),
    ("global_read_out_of_bounds", "global memory out of bounds.* bytes into b of 256"),
    ("global_write_out_of_bounds", "global memory out of bounds.* bytes into d of 512"),
    ("shared_read_out_of_bounds", "shared memory out of bounds"),
    ("shared_write_out_of_bounds", "shared memory out of bounds"),
    ("unwritten_shared_memory", "shared memory that no thread wrote"),
    ("divergent_barrier", "divergent barrier: 32 threads wait at .*, 32 threads wait at"),
    ("early_exit", "divergent barrier: 32 threads have exited, 32 threads wait at"),
    ("absent_lane", "deadlock: 33 threads have exited, 31 threads wait at mma"),
    ("wrong_fragment_index", "the product is wrong"),
    ("misaligned_matrix_row", "misaligned access of 16 bytes"),
    ("missing_async_wait", "shared memory that no thread wrote"),
    ("missing_warp_barrier", "race in shared memory, a barrier is missing|no thread wrote"),
    ("two_writers", "race in d: two threads write the same element"),
    ("write_to_input", "write to a, an input"),
    ("oversized_shared_memory", "the kernel's shared memory is larger than the launch's"),
]


def address(tensor: torch.Tensor) -> emulation.ctypes.c_void_p:
    return emulation.ctypes.c_void_p(tensor.data_ptr())


def planted_product(plant: int, seed: int) -> None:
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    d = torch.full((16, 8), torch.nan)
    arguments = (plant, *map(address, (a, b, d)))
    tensors = {"inputs": {"a": a, "b": b}, "outputs": {"d": d}}
    emulation.run("planted_product", *arguments, **tensors, seed=seed)
    if not torch.allclose(d, a.float() @ b.float(), atol=1e-4):
        raise emulation.Fault("the product is wrong")


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize(("name", "report"), PLANTS, ids=[name for name, _ in PLANTS])
def test_planted_fault_is_reported_in_every_thread_order(name, report, seed):
    plant = [name for name, _ in PLANTS].index(name)
    if report is None:
        planted_product(plant, seed)
    else:
        with pytest.raises(emulation.Fault, match=report):
            planted_product(plant, seed)


def fragments(matrix: torch.Tensor, rows: str) -> torch.Tensor:
    """Split into fragments as the PTX manual says for m16n8k16: [lane, element] values."""
    # PTX: row = groupID for ai where 0 <= i < 2 || 4 <= i < 6, else groupID + 8;
    #      col = threadID_in_group * 2 + (i & 1), and + 8 for ai where i >= 4.
    # bi: row = threadID_in_group * 2 + (i & 1), and + 8 for i >= 2; col = groupID.
    lanes = []
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        if rows == "a":
            where = [
                (
                    group if 0 <= i < 2 or 4 <= i < 6 else group + 8,
                    thread * 2 + (i & 1) + (8 if i >= 4 else 0),
                )
                for i in range(8)
            ]
        else:
            where = [(thread * 2 + (i & 1) + (8 if i >= 2 else 0), group) for i in range(4)]
        lanes.append(torch.stack([matrix[row, column] for row, column in where]))
    return torch.stack(lanes).contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_has_the_manuals_layout(dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    fragment_a, fragment_b = fragments(a, "a"), fragments(b, "b")
    d = torch.full((32, 4), torch.nan)
    emulation.run(
        "fragment_product",
        int(dtype == torch.float16),
        *map(address, (fragment_a, fragment_b, d)),
        inputs={"a": fragment_a, "b": fragment_b},
        outputs={"d": d},
    )
    product = a.float() @ b.float()
    for lane in range(32):
        for i in range(4):  # ci: row = groupID for i < 2, else + 8; col = thread * 2 + (i & 1)
            row, column = (lane >> 2) + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)
            assert d[lane, i] == pytest.approx(product[row, column].item(), abs=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_has_the_manuals_layout(transposed):
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    loaded = torch.full((32, 4, 2), -1, dtype=torch.int16)
    emulation.run(
        "fragment_matrices",
        int(transposed),
        *map(address, (matrices, loaded)),
        inputs={"matrices": matrices},
        outputs={"fragments": loaded},
    )
    whole = matrices.mT if transposed else matrices
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        assert loaded[lane].tolist() == whole[:, row, column : column + 2].tolist()
