# ruff: noqa: N999
"""Native kernels: addresses and sizes in, nothing out. See csrc/bindings.cpp.

Addresses are integers, 0 is null; tensors are contiguous. Parameters, statistics and parameter
gradients are float32, or float64 with float64 activations. Kernel sizes: 3, 5, 7, 9, 11, 13.
"""

from typing import Any

float32: int
float64: int
bfloat16: int
float16: int

def build_info() -> dict[str, Any]: ...

class _Cpu:
    def nested_conv_forward(
        self,
        h: int,
        conv_weight: int,
        conv_bias: int,
        ln_weight: int,
        ln_bias: int,
        v: int,
        u: int,
        mean: int,
        rstd: int,
        N: int,
        H: int,
        W: int,
        C: int,
        K: int,
        eps: float,
        shortcut: bool,
        dtype: int,
    ) -> None: ...
    def nested_conv_backward(
        self,
        dv: int,
        h: int,
        u: int,
        mean: int,
        rstd: int,
        conv_weight: int,
        ln_weight: int,
        ln_bias: int,
        dh: int,
        dconv_weight: int,
        dconv_bias: int,
        dln_weight: int,
        dln_bias: int,
        N: int,
        H: int,
        W: int,
        C: int,
        K: int,
        shortcut: bool,
        dtype: int,
    ) -> None: ...
    def dwconv_gelu_layernorm_forward(
        self,
        x: int,
        conv_weight: int,
        conv_bias: int,
        ln_weight: int,
        ln_bias: int,
        y: int,
        c: int,
        mean: int,
        rstd: int,
        N: int,
        H: int,
        W: int,
        C: int,
        K: int,
        eps: float,
        gelu: bool,
        norm_first: bool,
        dtype: int,
    ) -> None: ...
    def dwconv_gelu_layernorm_backward(
        self,
        dy: int,
        x: int,
        c: int,
        mean: int,
        rstd: int,
        conv_weight: int,
        ln_weight: int,
        ln_bias: int,
        dx: int,
        dconv_weight: int,
        dconv_bias: int,
        dln_weight: int,
        dln_bias: int,
        N: int,
        H: int,
        W: int,
        C: int,
        K: int,
        gelu: bool,
        norm_first: bool,
        dtype: int,
    ) -> None: ...
    def gelu_layernorm_forward(
        self,
        x: int,
        ln_weight: int,
        ln_bias: int,
        y: int,
        mean: int,
        rstd: int,
        rows: int,
        C: int,
        eps: float,
        norm_first: bool,
        dtype: int,
    ) -> None: ...
    def gelu_layernorm_backward(
        self,
        dy: int,
        x: int,
        mean: int,
        rstd: int,
        ln_weight: int,
        ln_bias: int,
        dx: int,
        dln_weight: int,
        dln_bias: int,
        rows: int,
        C: int,
        norm_first: bool,
        dtype: int,
    ) -> None: ...
    def layernorm_residual_forward(
        self,
        t: int,
        x: int,
        ln_weight: int,
        ln_bias: int,
        scale: int,
        y: int,
        mean: int,
        rstd: int,
        rows: int,
        C: int,
        eps: float,
        dtype: int,
    ) -> None: ...
    def layernorm_residual_backward(
        self,
        dy: int,
        t: int,
        x: int,
        mean: int,
        rstd: int,
        ln_weight: int,
        scale: int,
        dt: int,
        dx: int,
        dln_weight: int,
        dln_bias: int,
        dscale: int,
        rows: int,
        C: int,
        dtype: int,
    ) -> None: ...
    def nested_block_pack(
        self,
        fc1_weight: int,
        conv_weight: int,
        fc2_weight: int,
        C: int,
        D: int,
        K: int,
        dtype: int,
        packed: int,
    ) -> int: ...
    def nested_block_forward(
        self,
        inputs: list[int],  # 13, in the order of NestedBlockFwdParams
        outputs: list[int],  # 8
        N: int,
        H: int,
        W: int,
        C: int,
        D: int,
        K: int,
        eps: float,
        shortcut: bool,
        dtype: int,
    ) -> None: ...
    def nested_block_backward(
        self,
        inputs: list[int],  # 18, in the order of NestedBlockBwdParams
        outputs: list[int],  # 12
        N: int,
        H: int,
        W: int,
        C: int,
        D: int,
        K: int,
        eps: float,
        shortcut: bool,
        dtype: int,
    ) -> None: ...
    def hash_words(self, addresses: list[int], bytes: list[int], all: bool) -> int: ...
    def isas(self) -> list[str]: ...
    def isa(self) -> str: ...
    def set_isa(self, name: str) -> None: ...
    def num_threads(self) -> int: ...
    def set_num_threads(self, count: int) -> None: ...
    def use_thread_pool(self, parallel_for_address: int, get_num_threads_address: int) -> None: ...

cpu: _Cpu

class _Cuda:
    """Only in a build with CUDA kernels. `stream` is a cudaStream_t as an integer."""

    float32: int
    bfloat16: int
    float16: int
    def runtime_version(self) -> int: ...
    def driver_version(self) -> int: ...
    def nested_conv_forward(
        self,
        h: int,
        conv_weight: int,
        conv_bias: int,
        ln_weight: int,
        ln_bias: int,
        v: int,
        u: int,
        mean: int,
        rstd: int,
        N: int,
        H: int,
        W: int,
        C: int,
        K: int,
        eps: float,
        shortcut: bool,
        dtype: int,
        stream: int,
    ) -> None: ...
    def nested_conv_backward_workspace(
        self,
        dv: int,
        h: int,
        u: int,
        dh: int,
        N: int,
        H: int,
        W: int,
        C: int,
        K: int,
        dtype: int,
    ) -> int: ...
    def nested_conv_backward(
        self,
        dv: int,
        h: int,
        u: int,
        mean: int,
        rstd: int,
        conv_weight: int,
        ln_weight: int,
        ln_bias: int,
        dh: int,
        dconv_weight: int,
        dconv_bias: int,
        dln_weight: int,
        dln_bias: int,
        workspace: int,
        N: int,
        H: int,
        W: int,
        C: int,
        K: int,
        shortcut: bool,
        dtype: int,
        stream: int,
    ) -> None: ...
    def dwconv_gelu_layernorm_forward(
        self,
        x: int,
        conv_weight: int,
        conv_bias: int,
        ln_weight: int,
        ln_bias: int,
        y: int,
        c: int,
        mean: int,
        rstd: int,
        N: int,
        H: int,
        W: int,
        C: int,
        K: int,
        eps: float,
        gelu: bool,
        norm_first: bool,
        dtype: int,
        stream: int,
    ) -> None: ...
    def dwconv_gelu_layernorm_backward_workspace(
        self, N: int, H: int, W: int, C: int, K: int, dtype: int
    ) -> int: ...
    def dwconv_gelu_layernorm_backward(
        self,
        dy: int,
        x: int,
        c: int,
        mean: int,
        rstd: int,
        conv_weight: int,
        ln_weight: int,
        ln_bias: int,
        dx: int,
        dconv_weight: int,
        dconv_bias: int,
        dln_weight: int,
        dln_bias: int,
        workspace: int,
        N: int,
        H: int,
        W: int,
        C: int,
        K: int,
        gelu: bool,
        norm_first: bool,
        dtype: int,
        stream: int,
    ) -> None: ...
    def gelu_layernorm_forward(
        self,
        x: int,
        ln_weight: int,
        ln_bias: int,
        y: int,
        mean: int,
        rstd: int,
        rows: int,
        C: int,
        eps: float,
        norm_first: bool,
        dtype: int,
        stream: int,
    ) -> None: ...
    def gelu_layernorm_backward_workspace(self, rows: int, C: int) -> int: ...
    def gelu_layernorm_backward(
        self,
        dy: int,
        x: int,
        mean: int,
        rstd: int,
        ln_weight: int,
        ln_bias: int,
        dx: int,
        dln_weight: int,
        dln_bias: int,
        workspace: int,
        rows: int,
        C: int,
        norm_first: bool,
        dtype: int,
        stream: int,
    ) -> None: ...
    def layernorm_residual_forward(
        self,
        t: int,
        x: int,
        ln_weight: int,
        ln_bias: int,
        scale: int,
        y: int,
        mean: int,
        rstd: int,
        rows: int,
        C: int,
        eps: float,
        dtype: int,
        stream: int,
    ) -> None: ...
    def layernorm_residual_backward_workspace(self, rows: int, C: int) -> int: ...
    def layernorm_residual_backward(
        self,
        dy: int,
        t: int,
        x: int,
        mean: int,
        rstd: int,
        ln_weight: int,
        scale: int,
        dt: int,
        dx: int,
        dln_weight: int,
        dln_bias: int,
        dscale: int,
        workspace: int,
        rows: int,
        C: int,
        dtype: int,
        stream: int,
    ) -> None: ...

cuda: _Cuda
