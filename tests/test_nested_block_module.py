"""NestedBlock as a module: recomputation, memory formats, compilers, copies, errors."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from convnest_kernels import NestedBlock, backends, use_backend
from tests.blocks import (  # noqa: F401 (one_thread is a fixture of every test here)
    DESIGNS,
    NORMS,
    assert_same,
    formula,
    make,
    one_thread,
    run,
)

# Recomputation.


def saved_storages(block: NestedBlock, x: Tensor) -> tuple[dict[int, int], Tensor]:
    """Bytes of each storage that autograd keeps for backward, by address, and the output."""
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    saved: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is given out twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x)
    return saved, y


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("norms", NORMS, ids="-".join)
@pytest.mark.parametrize("design", DESIGNS)
def test_recompute_keeps_less_and_changes_nothing(
    design: str, norms: tuple[str, str], backend: str | None, drop_path: float
) -> None:
    block = make(design=design, norm=norms, backend=backend, drop_path=drop_path, layer_scale=0.5)
    x = torch.randn(2, 5, 8, 8, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last)
    dy = torch.randn_like(x)
    wide_bytes = x.nbytes * 3
    results, wide_saved, total_saved = [], [], []
    for recompute in ("none", "conv", "all"):
        twin = copy.deepcopy(block)
        twin.recompute = recompute
        torch.manual_seed(0)
        results.append(run(twin, x, dy))
        assert twin.state_dict().keys() == block.state_dict().keys()
        results[-1].update(twin.named_buffers())  # running statistics move once
        saved, _ = saved_storages(twin, x.clone().requires_grad_())
        wide_saved.append(sum(size == wide_bytes for size in saved.values()))
        total_saved.append(sum(saved.values()))
    assert_same(results[1], results[0], rtol=1e-12, atol=1e-12)
    assert_same(results[2], results[0], rtol=1e-12, atol=1e-12)
    assert wide_saved[0] >= 2
    assert wide_saved[1:] == [1, 0]
    assert total_saved[0] > total_saved[1] > total_saved[2]


@pytest.mark.parametrize("recompute", ["conv", "all"])
@pytest.mark.parametrize("norms", [("layer", "layer"), ("batch", "layer")], ids="-".join)
def test_recompute_runs_on_the_backend_of_forward(
    norms: tuple[str, str], recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Counter[str] = Counter()
    select = backends.select
    monkeypatch.setattr(
        backends, "select", lambda call, name: (asked.update([name]), select(call, name))[1]
    )
    x = torch.randn(2, 5, 4, 4, requires_grad=True)
    block = make(dtype=torch.float32, norm=norms, recompute=recompute, drop_path=0.5)
    with use_backend("eager"):
        y = block(x)
    y.sum().backward()
    assert set(asked) <= {"eager"}


@pytest.mark.parametrize("recompute", ["none", "conv", "all"])
def test_no_grad_gives_the_same_output(recompute: str) -> None:
    block = make(recompute=recompute, norm=("batch", "batch"))
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    expected = block(x)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


# Memory formats and shapes.


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("norms", NORMS, ids="-".join)
@pytest.mark.parametrize("design", DESIGNS)
def test_memory_format_of_the_input_comes_out(
    design: str, norms: tuple[str, str], drop_path: float
) -> None:
    block = make(design=design, norm=norms, drop_path=drop_path)
    contiguous = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        x = contiguous.contiguous(memory_format=memory_format).requires_grad_()
        y = block(x)
        assert y.is_contiguous(memory_format=memory_format)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        assert grad.shape == x.shape
        results.append({"y": y, "x": grad})
    assert_same(results[0], results[1], rtol=1e-12, atol=1e-12)


class CopyCounter(TorchDispatchMode):
    """Counts the copies that PyTorch makes."""

    copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.copies += func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norms", NORMS, ids="-".join)
@pytest.mark.parametrize("design", DESIGNS)
def test_channels_last_is_never_copied(design: str, norms: tuple[str, str]) -> None:
    for drop_path in (0.0, 0.5):
        block = make(design=design, norm=norms, drop_path=drop_path)
        x = torch.randn(2, 5, 4, 6, dtype=torch.float64)
        for memory_format, copies in ((torch.channels_last, 0), (torch.contiguous_format, 2)):
            strided = x.contiguous(memory_format=memory_format)
            with CopyCounter() as counter:
                block(strided)
            assert counter.copies == copies


@pytest.mark.parametrize("shape", [(1, 5, 1, 1), (2, 5, 1, 7), (3, 5, 9, 2), (1, 5, 13, 11)])
def test_any_map_and_any_strides(shape: tuple[int, ...]) -> None:
    block = make(kernel_size=7)
    n, c, h, w = shape
    base = torch.randn(n + 1, c + 2, h + 3, w + 1, dtype=torch.float64)
    x = base[1:, 1:-1, 2:-1, 1:].flip(3)
    expected = formula(block, x, ("layer", "layer"), True)
    channels_last = base.contiguous(memory_format=torch.channels_last)
    for strided in (
        x,
        channels_last[1:, 1:-1, 2:-1, 1:].flip(3),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        torch.testing.assert_close(block(strided), expected)
    assert block(channels_last[1:, 1:-1]).is_contiguous(memory_format=torch.channels_last)
    one = x[:, :1, :1, :1].expand(n, c, h, w)  # strides of 0
    torch.testing.assert_close(block(one), formula(block, one, ("layer", "layer"), True))


def test_empty_batch() -> None:
    for design in DESIGNS:
        block = make(design=design)
        x = torch.empty(0, 5, 4, 4, dtype=torch.float64, requires_grad=True)
        y = block(x)
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("norms", NORMS, ids="-".join)
@pytest.mark.parametrize("design", DESIGNS)
def test_channels_last_module_and_autocast(
    design: str, norms: tuple[str, str], drop_path: float
) -> None:
    block = make(dtype=torch.float32, design=design, norm=norms, drop_path=drop_path)
    x, dy = torch.randn(2, 3, 5, 4, 4)
    results = []
    for enabled in (False, True):
        block.to(memory_format=torch.channels_last)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = block(x)
        assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
        grads = torch.autograd.grad(y, list(block.parameters()), dy.to(y.dtype))
        for parameter, grad in zip(block.parameters(), grads, strict=True):
            assert grad.dtype == torch.float32
            assert grad.shape == parameter.shape
        # As one vector: a bias before a batch norm has no gradient but what rounding leaves.
        results.append((y.float(), torch.cat([grad.flatten() for grad in grads])))
    for value, low in zip(*results, strict=True):
        assert (value - low).norm() < 0.1 * value.norm()


# Compilers and copies.


@pytest.mark.parametrize("recompute", ["none", "conv", "all"])
@pytest.mark.parametrize(
    ("design", "norms", "drop_path"),
    [
        ("convnest", ("layer", "layer"), 0.0),
        ("convnest", ("layer", "layer"), 0.5),
        ("convnest", ("batch", "layer"), 0.0),
        ("vanilla", ("layer", "batch"), 0.0),
        ("pre_activation", ("layer", "layer"), 0.0),
    ],
)
def test_compiles_without_graph_breaks(
    design: str, norms: tuple[str, str], drop_path: float, recompute: str
) -> None:
    torch.compiler.reset()
    block = make(
        dtype=torch.float32, design=design, norm=norms, drop_path=drop_path, recompute=recompute
    )
    twin = copy.deepcopy(block)
    # AOTAutograd's own backward, without the minutes of code generation.
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for size in (4, 6):  # the second size is compiled with dynamic shapes
        x = torch.randn(2, 5, size, size)
        if drop_path:  # the compiler may draw in another order: compare where nothing is dropped
            assert compiled(x).isfinite().all()
            block.eval(), twin.eval()
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled(ours).square().sum().backward()
        block(theirs).square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)
        block.train(), twin.train()
    for (name, value), other in zip(twin.named_parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-3, atol=1e-3, msg=name)
    for (name, value), other in zip(twin.named_buffers(), block.buffers(), strict=True):
        torch.testing.assert_close(value, other, msg=name)


def test_function_transforms() -> None:
    """Gradients of each sample, by torch.func, are those of autograd."""
    for design in DESIGNS:
        block = make(design=design, layer_scale=0.5)
        parameters = {name: p.detach() for name, p in block.named_parameters()}
        x = torch.randn(3, 5, 4, 4, dtype=torch.float64)

        def loss(parameters: dict[str, Tensor], x: Tensor, block: NestedBlock = block) -> Tensor:
            return torch.func.functional_call(block, parameters, (x[None],)).square().sum()

        grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        for i in range(3):
            block.zero_grad()
            block(x[i : i + 1]).square().sum().backward()
            for name, parameter in block.named_parameters():
                torch.testing.assert_close(grads[name][i], parameter.grad, msg=name)


@pytest.mark.parametrize("recompute", ["none", "conv", "all"])
def test_double_backward(recompute: str) -> None:
    block = make(recompute=recompute)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    penalties = []
    for y in (block(x), formula(block, x, ("layer", "layer"), True)):
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(grad.square().sum(), [x, *block.parameters()]))
    for ours, theirs in zip(*penalties, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_export() -> None:
    block = make(dtype=torch.float32).eval()
    x = torch.randn(2, 5, 6, 6)
    height = torch.export.Dim("height", min=2, max=64)
    program = torch.export.export(block, (x,), dynamic_shapes={"x": {2: height}})
    taller = torch.randn(2, 5, 9, 6)
    torch.testing.assert_close(program.module()(taller), block(taller))


@pytest.mark.parametrize("design", DESIGNS)
def test_copies_and_pickles(design: str) -> None:
    block = make(design=design, norm=("batch", "layer"), layer_scale=0.5, drop_path=0.1).eval()
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x), block(x))
        assert repr(twin) == repr(block)


def test_repr_says_what_is_not_default() -> None:
    assert NestedBlock(8).extra_repr() == "8, expansion=12, kernel_size=7, design='convnest'"
    text = NestedBlock(
        8,
        expansion=2.5,
        kernel_size=3,
        shortcut=False,
        res_scale=None,
        layer_scale=0.1,
        drop_path=0.2,
        recompute="conv",
        backend="eager",
    ).extra_repr()
    assert text == (
        "8, expansion=2.5, kernel_size=3, design='convnest', shortcut=False, res_scale=None, "
        "layer_scale, drop_path=0.2, recompute='conv', backend='eager'"
    )


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"dim": 4.0}, "dim must be an int, got 4.0"),
        ({"dim": True}, "dim must be an int, got True"),
        ({"expansion": 1.3}, "expansion must give a whole number.* got 1.3 x 8 = 10.4"),
        ({"expansion": 0}, "expansion must give a whole number.* got 0 x 8 = 0"),
        ({"expansion": "4"}, "expansion must be a number, got '4'"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"kernel_size": -1}, "kernel_size must be at least 1, got -1"),
        ({"kernel_size": (7, 7)}, r"kernel_size must be an int, got \(7, 7\)"),
        ({"design": "resnet"}, "design must be one of 'vanilla', .* got 'resnet'"),
        ({"norm": "layer"}, "norm must be a pair like .* got 'layer'"),
        ({"norm": ("layer",)}, r"norm must be a pair like .* got \('layer',\)"),
        ({"norm": ("layer", "group")}, r"norm\[1\] must be one of 'layer', 'batch', got 'group'"),
        ({"res_scale": "1"}, "res_scale must be a number, got '1'"),
        ({"res_scale": float("nan")}, "res_scale must be finite, got nan"),
        ({"layer_scale": True}, "layer_scale must be a number, got True"),
        ({"shortcut": None}, "shortcut must be a bool, got None"),
        ({"design": "vanilla", "shortcut": False}, "shortcut=False needs design='convnest'"),
        ({"design": "post_norm", "shortcut": False}, "'post_norm' has no inner shortcut"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
        ({"drop_path": -0.1}, r"drop_path must be in \[0, 1\), got -0.1"),
        ({"eps": 0}, "eps must be above 0, got 0"),
        ({"recompute": "some"}, "recompute must be one of 'none', 'conv', 'all', got 'some'"),
        ({"recompute": None}, "recompute must be one of 'none', 'conv', 'all', got None"),
        ({"backend": "tpu"}, "backend must be one of .* got 'tpu'"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        NestedBlock(**{"dim": 8, **options})


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (8, 8, 8), (2, 8, 8, 5)])
def test_a_wrong_input_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must be \[N, 5, H, W\], got \["):
        make(dtype=torch.float32)(torch.randn(shape))


def test_whole_float_expansions_are_fine() -> None:
    assert NestedBlock(10, expansion=1.1).wide_dim == 11  # 11.000000000000002 in floats
    assert NestedBlock(8, expansion=12.0).wide_dim == 96
