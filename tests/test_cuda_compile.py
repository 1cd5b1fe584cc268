"""What nvcc makes of the CUDA kernels: no spills, HMMA, registers and bytes within budget."""

from __future__ import annotations

import functools

import pytest

from bench import sass
from tests import emulation

pytestmark = pytest.mark.skipif(sass.missing() is not None, reason=str(sass.missing()))

reads_machine_code = pytest.mark.skipif(
    sass.nvdisasm() is None, reason="there is no nvdisasm, neither the toolkit's nor triton's"
)

SOURCES = [
    "nested_conv.cu",
    "nested_conv_bwd.cu",
    "nested_conv_bwd_fused.cu",
    "dwconv_gelu_layernorm.cu",
    "dwconv_gelu_layernorm_bwd.cu",
    "gelu_layernorm.cu",
    "layernorm_residual.cu",
    "depthwise_fma.cu",
    "depthwise_small.cu",
    "depthwise_small_bwd.cu",
]
ARCHS = ["sm_80", "sm_90"]
MORE_ARCHS = ["sm_86", "sm_89", "sm_100", "sm_120"]

# Registers of a thread, so that the blocks meant to share an SM do: two of 256 threads for the
# vector kernels up to 7×7 (but for the weight gradient with a norm), one for the rest; the rows'
# backward has up to 512 threads.
REGISTERS = {
    "nested_conv_fwd_kernel": 128,
    "depthwise_kernel": 128,
    "depthwise_wgrad_kernel": 128,
    "nested_conv_bwd_kernel": 128,
    "nested_conv_finish_kernel": 40,
    "row_statistics_kernel": 128,
    "layernorm_bwd_kernel": 128,
    "sum_partials_kernel": 32,
    "depthwise_fma_kernel": 128,
    "depthwise_fma_wgrad_kernel": 128,
    "depthwise_small_kernel": 128,
    "depthwise_small_bwd_kernel": 128,
}
FMA = ("depthwise_fma_kernel", "depthwise_fma_wgrad_kernel")
# With more taps than 7×7 one block of 256 threads, or two of 192, share an SM.
FMA_REGISTERS = {9: 232, 11: 192, 13: 192}
# These take vectors alone.
FUSED = ("nested_conv_bwd_kernel", "nested_conv_finish_kernel")
ROWS = ("row_statistics_kernel", "layernorm_bwd_kernel", "nested_conv_finish_kernel")
CONVOLUTIONS = (
    "nested_conv_fwd_kernel",
    "depthwise_kernel",
    "depthwise_wgrad_kernel",
    "nested_conv_bwd_kernel",
)

# Small maps: a warp's share of a tile of 16 images and 16 channels, 7×7 in bf16. Of the forward's
# plain convolution three blocks are to share an SM.
SMALL = ("depthwise_small_kernel", "depthwise_small_bwd_kernel")
SMALL_INSTRUCTIONS = {
    ("depthwise_small_kernel", "(MapSource)0"): 500,
    ("depthwise_small_kernel", "(MapSource)1"): 1920,
    ("depthwise_small_bwd_kernel", "(MapSource)0"): 800,
    ("depthwise_small_bwd_kernel", "(MapSource)1"): 2420,
}

# A warp's stage of a 7×7 in bf16, 1024 nominal outputs or (both gradients) 512, takes this many
# warp instructions at most.
STAGE_INSTRUCTIONS = {
    ("nested_conv_fwd_kernel",): 1120,
    ("depthwise_kernel", "(Source)0"): 300,
    ("depthwise_kernel", "(Source)1"): 840,
    ("depthwise_wgrad_kernel", "false", "false"): 360,
    ("depthwise_wgrad_kernel", "false", "true"): 360,  # the next stage's rows on their way
    ("depthwise_wgrad_kernel", "true", "false"): 790,
    ("nested_conv_bwd_kernel",): 1150,
}


@functools.cache
def kernels(source: str, arch: str) -> list[sass.Kernel]:
    return sass.compile_kernels(sass.CSRC / source, arch)


def parse(kernel: sass.Kernel) -> tuple[str, list[str]]:
    name, _, parameters = kernel.name.partition("<")
    return name, parameters.rstrip(">").split(", ")


def takes_vectors(name: str, parameters: list[str]) -> bool:
    return name in FUSED or parameters[-1] == "true"


@pytest.fixture(
    params=[
        pytest.param((s, a), marks=[] if a in ARCHS else pytest.mark.slow, id=f"{s}-{a}")
        for s in SOURCES
        for a in (*ARCHS, *MORE_ARCHS)
    ]
)
def target(request):
    return request.param


@pytest.fixture
def compiled(target):
    return kernels(*target)


def test_no_spills_and_registers_within_budget(target, compiled):
    # There shared memory has room for one block of most kernels, which may take them all.
    one_block = target[1] == "sm_120"
    for kernel in compiled:
        name, parameters = parse(kernel)
        assert kernel.spill_bytes == 0, kernel.name
        assert kernel.stack_bytes == 0, kernel.name
        roomy = name in CONVOLUTIONS and (
            (one_block and name not in FUSED)
            or parameters[1] == "9"
            or not takes_vectors(name, parameters)
            or (name == "depthwise_wgrad_kernel" and parameters[2] == "true")
        )
        budget = 255 if roomy else REGISTERS[name]
        if name in FMA:
            budget = FMA_REGISTERS.get(int(parameters[1]), budget)
        if name == "depthwise_small_kernel" and parameters[3] == "(MapSource)0":
            budget = 80
        if name == "depthwise_small_bwd_kernel" and (one_block or int(parameters[1]) > 7):
            budget = 255
        assert kernel.registers <= budget, kernel.name


@reads_machine_code
def test_the_convolutions_run_on_the_tensor_cores(compiled):
    found = [kernel for kernel in compiled if parse(kernel)[0] in CONVOLUTIONS]
    for kernel in found:
        name, parameters = parse(kernel)
        size = int(parameters[1])
        assert kernel.count("HMMA.16816.F32") > 0, kernel.name
        assert kernel.count("LDSM.16") > 0, kernel.name
        # 8 rows and channels of a warp's stage, each with a product for every kernel row; db's is
        # one more. Of both gradients it is 4 rows of a channel, with db and dγ, dβ beside them.
        mix = kernel.stage_mix()
        products = sum(n for op, n in mix.items() if op.startswith("HMMA"))
        beside = {"depthwise_wgrad_kernel": 8, "nested_conv_bwd_kernel": 4 + 4}.get(name, 0)
        assert products == 8 * size + beside, kernel.name


def pairs_of_rows(size: int, side: int) -> int:
    """Pairs of input rows (2p, 2p + 1) that a row y of a map meets, over all y."""
    radius = size // 2
    return sum(-1 <= 2 * p - y + radius < size for p in range(4) for y in range(side))


@reads_machine_code
def test_small_maps_run_on_the_tensor_cores(compiled):
    for kernel in compiled:
        name, parameters = parse(kernel)
        if name not in SMALL:
            continue
        element, size, side, source = parameters[0], *map(int, parameters[1:3]), parameters[3]
        # Both channels of a warp; backward: twice the pairs, and a row of ones for the bias
        pairs = pairs_of_rows(size, side)
        products = pairs if name == "depthwise_small_kernel" else 2 * pairs + side
        assert kernel.count("HMMA.16816.F32") == 2 * products, kernel.name
        mix = kernel.instructions if name == SMALL[0] else list(kernel.stage_mix().elements())
        found = [op if isinstance(op, str) else op[0] for op in mix]
        reads = [op for op in found if op.startswith("LDG") and "128" in op]
        writes = [op for op in found if op.startswith("STG")]
        nested = source == "(MapSource)1"
        backward = name == SMALL[1]
        assert len(reads) == side * (1 + backward * (1 + nested)), kernel.name
        assert writes and all("128" in op for op in writes), kernel.name
        if (element, size, side) == ("BFloat16", 7, 7):
            code = [op for op in found if not op.endswith(":") and op != "NOP"]
            assert len(code) <= SMALL_INSTRUCTIONS[name, source], (kernel.name, len(code))


@reads_machine_code
@pytest.mark.parametrize("arch", ARCHS)
def test_the_fma_kernels_do_little_else(arch):
    """Of a row's (or stage's) instructions, 7·K·K products a strip are by far the most."""
    for kernel in kernels("depthwise_fma.cu", arch):
        name, parameters = parse(kernel)
        size = int(parameters[1])
        rows = 1 if name == "depthwise_fma_kernel" else 2
        kernel_rows = size if rows == 1 or size <= 9 else (size + 1) // 2
        products = 7 * size * kernel_rows * rows
        loop = kernel.loop_mix("FFMA", products)
        assert sum(n for op, n in loop.items() if op.startswith("FFMA")) >= products, kernel.name
        # All that comes 16 bytes at a time is on its way while they run.
        wide = [op for op, _ in kernel.instructions if op.startswith("LDG") and ".128" in op]
        assert wide and all(op.startswith("LDGSTS") for op in wide), kernel.name
        assert kernel.count("HMMA") == 0, kernel.name


@reads_machine_code
def test_global_accesses_are_16_bytes_wide(compiled):
    for kernel in compiled:
        name, parameters = parse(kernel)
        if name not in CONVOLUTIONS or not takes_vectors(name, parameters):
            continue
        mix = kernel.stage_mix()
        reads = [op for op in mix if op.startswith(("LDG.", "LDGSTS"))]
        writes = [op for op in mix if op.startswith("STG")]
        assert any("128" in op for op in reads), kernel.name
        # A pixel's row sums are two floats.
        pairs = sum(n for op, n in mix.items() if op in writes and "128" not in op)
        assert pairs <= 2 * (name == "nested_conv_bwd_kernel"), kernel.name
        # Nothing narrower but the statistics, 4 floats for a thread's pixels, by asynchronous copy
        # except where shared memory has no room for it
        narrow = {op: n for op, n in mix.items() if op in reads and "128" not in op}
        copies = all(op.startswith("LDGSTS") for op in narrow)
        tight = name == "nested_conv_bwd_kernel" and parameters[-1] == "(Schedule)0"
        assert sum(narrow.values()) <= 4 and (copies or tight), narrow


@reads_machine_code
def test_row_kernels_move_vectors(compiled):
    for kernel in compiled:
        name, parameters = parse(kernel)
        if name not in ROWS or not takes_vectors(name, parameters):
            continue
        reads = [op for op, _ in kernel.instructions if op.startswith("LDG")]
        writes = [op for op, _ in kernel.instructions if op.startswith("STG")]
        # 8 elements, in backward 4; statistics and partial sums are single floats.
        half = name == "layernorm_bwd_kernel" and parameters[0] != "Float32"
        width = ".64" if half else "128"
        assert any(width in op for op in reads), kernel.name
        assert any(width in op for op in writes) or "(RowOutput)0" in parameters, kernel.name
        assert not [op for op in reads + writes if ".U8" in op or ".U16" in op], kernel.name


@reads_machine_code
def test_stage_instructions_within_budget(compiled):
    for kernel in compiled:
        name, parameters = parse(kernel)
        if (
            name in CONVOLUTIONS
            and parameters[:2] == ["BFloat16", "7"]
            and takes_vectors(name, parameters)
        ):
            budget = STAGE_INSTRUCTIONS[(name, *parameters[2:-1])]
            assert kernel.stage_mix().total() <= budget, kernel.name


def test_template_instances_are_as_counted_in_the_sources():
    assert len(kernels("nested_conv.cu", "sm_80")) == 16 + 6
    assert len(kernels("nested_conv_bwd.cu", "sm_80")) == 16 + 16 + 6 + 1
    assert len(kernels("nested_conv_bwd_fused.cu", "sm_80")) == 18 + 2 + 1
    assert len(kernels("dwconv_gelu_layernorm.cu", "sm_80")) == 16 + 18
    assert len(kernels("dwconv_gelu_layernorm_bwd.cu", "sm_80")) == 16 + 24 + 18 + 1
    assert len(kernels("gelu_layernorm.cu", "sm_80")) == 12 + 12 + 1
    assert len(kernels("layernorm_residual.cu", "sm_80")) == 6 + 6 + 1
    assert len(kernels("depthwise_fma.cu", "sm_80")) == 10 + 10
    assert len(kernels("depthwise_small.cu", "sm_80")) == 28
    assert len(kernels("depthwise_small_bwd.cu", "sm_80")) == 28


@pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))
def test_shared_memory_within_budget():
    """Two blocks and 2 KB of the system's in sm_80's 164 KB; one block in sm_86's 99 KB."""
    lib = emulation.library()
    for kernel in (0, 1, 2, 6, 7):
        assert 0 < lib.shared_bytes_of_7x7(kernel) <= (164 * 1024 - 2048) // 2
    # Both gradients at once: one block of 512 threads and 1 KB in sm_90's 228 KB, sm_80's 164 KB
    # and sm_86's 100 KB
    assert 163 * 1024 < lib.shared_bytes_of_7x7(3) <= 227 * 1024
    assert 99 * 1024 < lib.shared_bytes_of_7x7(4) <= 163 * 1024
    assert 0 < lib.shared_bytes_of_7x7(5) <= 99 * 1024
