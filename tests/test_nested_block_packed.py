"""What nested_block keeps between calls on the CPU: used when it may be, never when stale."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from convnest_kernels import NestedBlock, _extension, ops
from convnest_kernels.cpu import _packed
from tests.test_nested_block_operator import Case, arguments, cotangent, each_isa, results

pytestmark = pytest.mark.skipif(_extension.module is None, reason="no native core")


@pytest.fixture(autouse=True)
def no_entries() -> Iterator[None]:
    _packed._entries.clear()
    yield
    _packed._entries.clear()


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each packing into kept memory."""
    done: list[int] = []
    pack = _packed._pack
    monkeypatch.setattr(_packed, "_pack", lambda *args: (done.append(1), pack(*args))[1])
    return done


def make() -> tuple[NestedBlock, Tensor]:
    block = NestedBlock(8, kernel_size=3).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block, torch.randn(2, 8, 5, 6)


def infer(block: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return block(x)


def fresh(block: NestedBlock, x: Tensor) -> Tensor:
    """From a copy of the parameters, whose weights were never packed."""
    return infer(copy.deepcopy(block), x)


def test_packs_on_the_second_call_and_once(packings: list[int]) -> None:
    block, x = make()
    outputs = []
    for expected in (0, 1, 1, 1):
        outputs.append(infer(block, x))
        assert len(packings) == expected
    assert all(torch.equal(y, outputs[0]) for y in outputs[1:])


def sgd(block: NestedBlock) -> None:
    for parameter in block.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(block.parameters(), lr=0.1).step()


def adam(block: NestedBlock, **options: bool) -> None:
    for parameter in block.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(block.parameters(), lr=0.1, **options).step()


def load(block: NestedBlock) -> None:
    block.load_state_dict({name: x + 1 for name, x in block.state_dict().items()})


def in_place_under_inference_mode(block: NestedBlock) -> None:
    with torch.inference_mode():
        block.mlp.fc2.weight.mul_(2)


def one_element(block: NestedBlock) -> None:
    with torch.no_grad():
        block.mlp.fc1.weight[3, 1] += 1  # none of the sampled words


def through_data(block: NestedBlock) -> None:
    block.mlp.fc1.weight.data.mul_(0.5)  # no version counter moves


def through_numpy(block: NestedBlock) -> None:
    block.conv_dw.weight.detach().numpy()[:] *= 2


def swap_data(block: NestedBlock) -> None:
    block.mlp.fc2.weight.data = torch.randn_like(block.mlp.fc2.weight)


def new_parameter(block: NestedBlock) -> None:
    del block.mlp.fc2.weight
    gc.collect()
    block.mlp.fc2.weight = nn.Parameter(torch.randn(8, 96))


def swap_with_another(block: NestedBlock) -> None:
    block.conv_dw.weight = nn.Parameter(block.conv_dw.weight.detach().flip(0).clone())


def same_memory_in_another_tensor(block: NestedBlock) -> None:
    """Address, version, strides and sampled words of the old weight; only identity tells."""
    old = block.mlp.fc2.weight
    old.data[3, 1] += 1
    new = nn.Parameter(old.data)
    with torch.no_grad():
        for _ in range(old._version):
            new.add_(0)
    assert (new.data_ptr(), new._version) == (old.data_ptr(), old._version)
    block.mlp.fc2.weight = new


CHANGES = [
    sgd,
    adam,
    lambda block: adam(block, foreach=True),
    lambda block: adam(block, fused=True),
    load,
    in_place_under_inference_mode,
    one_element,
    through_data,
    through_numpy,
    swap_data,
    new_parameter,
    swap_with_another,
    same_memory_in_another_tensor,
]


@pytest.mark.parametrize("change", CHANGES)
def test_sees_a_change(change: Callable[[NestedBlock], None]) -> None:
    block, x = make()
    for _ in range(3):
        before = infer(block, x)
    change(block)
    after = infer(block, x)
    assert not torch.equal(after, before)
    for _ in range(3):
        assert torch.equal(infer(block, x), fresh(block, x))


WEIGHTS = ["mlp.fc1.weight", "conv_dw.weight", "mlp.fc2.weight"]


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_sees_one_element_through_data_from_512_pixels_on(
    name: str, parameters: torch.dtype
) -> None:
    """Wherever it is, the last one too; whether it was packed for fewer pixels or for as many."""
    block, _ = make()
    block = block.to(parameters)
    weight = block.get_parameter(name)
    for size in (16, 4):  # of the calls that pack: two images are 512 or 32 pixels
        small, large = (torch.randn(2, 8, n, n).to(parameters) for n in (size, 16))
        for element in (0, 1, 101, weight.numel() - 2, weight.numel() - 1):
            for _ in range(3):
                infer(block, small)
            before = infer(block, large)
            assert next(iter(_packed._entries.values())).memory is not None
            weight.data.view(-1)[element] += 4
            after = infer(block, large)
            assert not torch.equal(after, before), element
            assert torch.equal(after, fresh(block, large)), element


def test_dtypes_and_instruction_sets_do_not_mix() -> None:
    block, x = make()
    core = _extension.module
    assert core is not None
    before = core.cpu.isa()
    expected = {}
    try:
        for _ in range(3):
            for isa in core.cpu.isas():
                core.cpu.set_isa(isa)
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    y = infer(block, x.to(dtype))
                    assert torch.equal(y, expected.setdefault((isa, dtype), y))
    finally:
        core.cpu.set_isa(before)


def test_memory_goes_with_the_weights() -> None:
    block, x = make()
    for _ in range(2):
        infer(block, x)
        infer(block, x.bfloat16())
    assert len(_packed._entries) == 2
    memory = weakref.ref(next(iter(_packed._entries.values())).memory)
    assert memory() is not None
    del block
    gc.collect()
    assert not _packed._entries
    assert memory() is None


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages to ask for"
)
def test_large_memory_asks_for_huge_pages() -> None:
    block = NestedBlock(192, kernel_size=3).eval()
    x = torch.randn(1, 192, 2, 2)
    for _ in range(2):
        infer(block, x)
    ((*_, memory),) = _packed._entries.values()
    assert memory.nbytes > _packed._HUGE_PAGE
    assert memory.data_ptr() % _packed._HUGE_PAGE == 0
    assert "hg" in mapping_flags(memory.data_ptr())


def mapping_flags(address: int) -> list[str]:
    """Of the mapping that an address lies in, as the kernel names them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *words = line.split()
        if not name.endswith(":"):
            begin, end = (int(bound, 16) for bound in name.split("-"))
            inside = begin <= address < end
        elif name == "VmFlags:" and inside:
            return words
    raise AssertionError(f"no mapping of {address:x}")


def test_training_keeps_nothing(packings: list[int]) -> None:
    block, x = make()
    for _ in range(3):
        block(x).sum().backward()
    assert not packings
    assert not _packed._entries


def test_inference_tensors_and_computed_weights() -> None:
    block, x = make()
    expected = infer(block, x)
    with torch.inference_mode():
        frozen = copy.deepcopy(block)
        for _ in range(3):
            assert torch.equal(frozen(x), expected)
    for _ in range(3):
        computed = {name: p.detach() * 1 for name, p in block.named_parameters()}
        with torch.no_grad():
            assert torch.equal(torch.func.functional_call(block, computed, (x,)), expected)
    del computed, frozen
    gc.collect()
    assert len(_packed._entries) == 1


def test_threads_and_changes() -> None:
    """Each thread sees its own block right while others pack, change and free theirs."""
    wrong: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(4):
            block, x = make()
            with torch.no_grad():
                for parameter in block.parameters():
                    parameter.normal_(generator=generator)
            expected = fresh(block, x)
            for _ in range(10):
                if not torch.equal(infer(block, x), expected):
                    wrong.append(f"thread {seed}")
            sgd(block)
            if not torch.equal(infer(block, x), fresh(block, x)):
                wrong.append(f"thread {seed}, changed")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.usefixtures("threads")
@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", [Case((1, 45, 5, 8), 50), Case((1, 7, 7, 24), 288), Case((2, 7, 7, 6), 880)], ids=str
)
def test_nothing_is_left_of_an_earlier_call(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Scratch memory is kept from call to call; bands begin at even rows and at odd ones."""
    tensors, bad, dy = arguments(case, dtype), arguments(case, dtype), cotangent(case, dtype)
    with torch.no_grad():
        bad["x"].fill_(float("nan"))
    options = {"backend": backend, "recompute": "all"}
    expected = results(ops.nested_block, tensors, dy, **options)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results(ops.nested_block, bad, dy, **options)
        for name, value in results(ops.nested_block, tensors, dy, **options).items():
            assert torch.equal(value, expected[name]), name
