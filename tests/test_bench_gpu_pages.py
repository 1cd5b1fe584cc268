"""The pages that bench.kernels and bench.sizes make of what they measured on a GPU."""

from __future__ import annotations

import json

import pytest

from bench import kernels, sizes
from bench.readme import RESULTS

MACHINE = {"gpu": "Pretended GPU", "versions": {"torch": "2.11.0"}}


@pytest.mark.parametrize(("tool", "name"), [(kernels, "kernels"), (sizes, "sizes")])
def test_committed_pages_are_made_from_their_figures(tool: object, name: str) -> None:
    for path in RESULTS.glob(f"*/{name}.json"):
        page = tool.page(json.loads(path.read_text()))  # type: ignore[attr-defined]
        assert path.with_suffix(".md").read_text() == page


def test_kernels_in_passes() -> None:
    rows = [
        {"operator": "nested_conv", "stage": stage, "backend": "cuda", "wide_bytes": 1_000_000,
         "kernels": {"nested_conv_fwd_kernel": 2.0 * stage}}
        for stage in (1, 3)
    ]  # fmt: skip
    results = {"machine": MACHINE, "dtype": "bfloat16", "batch": 2, "copy": 1e12, "rows": rows}
    page = kernels.page({**results, "command": "python -m bench.kernels"})
    line = "| `nested_conv` | cuda | `nested_conv_fwd_kernel` | 2 (2.0) | – | 6 (6.0) | – |"
    assert line in page.splitlines()


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void convnest::cuda::sum_partials_kernel<16>(convnest::cuda::SumPartialsArgs)",
         "sum_partials_kernel"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16>(int)",
         "vectorized_layer_norm_kernel"),
        ("depthwise_bwd_matrix_kernel", "depthwise_bwd_matrix_kernel"),
    ],
)  # fmt: skip
def test_names_of_kernels(name: str, short: str) -> None:
    assert kernels.short(name) == short


def test_what_is_no_kernel_of_a_step() -> None:
    for name in ("cudaLaunchKernel", "cuLaunchKernelEx", "Activity Buffer Request",
                 "Memset (Device)", "void at::native::bfloat16_copy_kernel_cuda<8>"):  # fmt: skip
        assert kernels.LEFT_OUT.search(name)
    for name in ("void cudnn::cnn::wgrad2d_grouped_direct_kernel<false>", "conv2d_c1_k1_nhwc"):
        assert not kernels.LEFT_OUT.search(name)


def test_sizes_in_milliseconds() -> None:
    times = {"infer": 1e-3, "train": 2.5e-3}
    row = {"operator": "gelu_layernorm", "kernel_size": 0, "dtype": "bfloat16"}
    results = {"machine": MACHINE, "stage": 2, "batch": 128, "command": "python -m bench.sizes"}
    page = sizes.page({**results, "rows": [row | dict.fromkeys(sizes.BACKENDS, times)]})
    columns = " | ".join(["1.000 / 2.500"] * 3)
    assert f"| `gelu_layernorm` | – | bfloat16 | {columns} |" in page.splitlines()
