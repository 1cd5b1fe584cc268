"""The scripts of examples/: each trains, goes on with the same bits, and splits over ranks.

They need timm, torchvision and pycocotools, which `make test-zoo` installs.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")

from convnest_kernels.models import create_model, list_models
from convnest_kernels.train import checkpoint
from convnest_kernels.train.errors import TrainError, UsageError
from tests import recipe_data
from tests.ranks import Ranks, ranks
from tests.training import one_thread

__all__ = ["one_thread", "ranks"]  # fixtures

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = [
    # pycocotools passes NumPy a keyword that it has deprecated, and timm leaves files open.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def script(name: str) -> ModuleType:
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return __import__(name)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    weights = root / "weights.safetensors"
    torch.manual_seed(3)
    save_file(create_model("convnest_atto", 10).state_dict(), weights)
    teacher = root / "teacher.safetensors"
    from timm import create_model as create_timm_model

    save_file(create_timm_model("test_convnext", num_classes=3).state_dict(), teacher)
    return {
        "folders": recipe_data.class_folders(root / "folders"),
        "masks": recipe_data.mask_folders(root / "masks"),
        "coco": recipe_data.coco_folders(root / "coco"),
        "weights": weights,
        "teacher": teacher,
    }


COMMON = ["--model", "convnest_atto", "--workers", "0", "--device", "cpu"]
FOLDERS = [*COMMON, "--batch", "8", "--image-size", "64", "--mix-batch", "4", "--epochs", "4"]
DENSE = [*COMMON, "--warmup-steps", "1", "--lr", "1e-3"]
IMAGENET = [*FOLDERS, "--warmup-epochs", "1", "--lr", "5e-4"]
MASKS = ["--image-size", "64", "--batch", "8", "--count-zero", "--classes", "4", "--channels", "64"]
COCO = ["--min-sizes", "48", "64", "--max-size", "80", "--batch", "2", "--channels", "32"]
RUNS = {
    "imagenet": IMAGENET,
    "finetune": [*FOLDERS, "--lr", "5e-4", "--ema", "0.9"],
    "distill": IMAGENET,
    "segment": [*DENSE, *MASKS, "--steps", "8", "--ema", "0.9"],
    "detect": [*DENSE, *COCO, "--epochs", "12", "--eval-every", "0"],
}
DATA = {"segment": "masks", "detect": "coco"}
# With the augmentation of 300 epochs nothing is learned in a dozen steps.
PLAIN = ["--randaugment", "", "--mixup", "0", "--cutmix", "0", "--erasing", "0", "--ema", "0.5"]
# Of a whole run; of detection's 12 epochs, the first.
STEPS = {"imagenet": 12, "finetune": 12, "distill": 12, "segment": 8, "detect": 6}


def arguments(name: str, data: dict[str, Path], output: Path, *more: str) -> list[str]:
    folder = data[DATA.get(name, "folders")]
    found = ["--data", str(folder), "--output", str(output), *RUNS[name], *more]
    if name == "finetune":
        found += ["--weights", str(data["weights"])]
    if name == "distill":
        found += ["--teacher", "test_convnext", "--teacher-weights", str(data["teacher"])]
    return found


def run(name: str, data: dict[str, Path], output: Path, *more: str) -> list[dict[str, Any]]:
    """Run a script in this process; returns its log."""
    script(name).main(arguments(name, data, output, *more))
    return read_log(output)


def read_log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def run_on_a_rank(name: str, arguments: list[str]) -> None:
    import warnings

    warnings.filterwarnings("ignore", category=DeprecationWarning, module="pycocotools")
    script(name).main(arguments)


MICRO = {"detect": "1"}


@pytest.mark.parametrize("name", RUNS)
def test_learns(name: str, data: dict[str, Path], tmp_path: Path) -> None:
    steps = STEPS[name]
    options = ["--micro-batch", MICRO.get(name, "8"), "--drop-path", "0.1"]
    options += ["--stop-after", str(steps)] if name == "detect" else []
    options += PLAIN if name in ("imagenet", "finetune", "distill") else []
    log = run(name, data, tmp_path, *options)
    assert [entry["step"] for entry in log] == list(range(1, steps + 1))
    losses = [entry["loss"] for entry in log]
    floor = 0.95 if name == "distill" else 0.9  # what a teacher is unsure of stays in the loss
    assert sum(losses[-3:]) < floor * sum(losses[:3]), losses
    if name in ("imagenet", "finetune", "distill"):
        assert log[-1]["top1"] > 0.5 and log[-1]["ema_top1"] > 0.5, log[-1]
        model = create_model("convnest_atto", num_classes=3)
        for kind in ("model", "ema"):
            model.load_state_dict(load_file(tmp_path / f"{kind}.safetensors"))


@pytest.mark.parametrize("name", RUNS)
def test_resumes_with_the_same_bits(name: str, data: dict[str, Path], tmp_path: Path) -> None:
    options = ["--micro-batch", MICRO.get(name, "4"), "--drop-path", "0.2"]
    if name == "imagenet":  # images drawn elsewhere leave this process's random numbers alone
        options += ["--workers", "1"]
    end = ["--stop-after", "4"]
    log = run(name, data, tmp_path / "whole", *options, *end)
    run(name, data, tmp_path / "parts", *options, "--stop-after", "2")
    parts = run(name, data, tmp_path / "parts", *options, "--resume", *end)
    for entry in (*log, *parts):
        del entry["seconds"]
    assert parts == log and len(log) == 4
    ours, metadata = checkpoint.read(tmp_path / "parts/last.safetensors")
    theirs, expected = checkpoint.read(tmp_path / "whole/last.safetensors")
    assert metadata == expected and metadata["step"] == 4
    assert ours.keys() == theirs.keys()
    assert any(key.startswith("ema.") for key in ours) == (name != "detect")
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_equal_one_with_twice_the_batch(
    name: str, data: dict[str, Path], tmp_path: Path, ranks: Ranks
) -> None:
    """In float64. Mask R-CNN's losses are means over what was found in a micro-batch: it takes
    the same micro-batches, one after the other; the others a micro-batch of twice the size."""
    alone = ["--micro-batch", MICRO.get(name, "8"), "--dtype", "float64", "--drop-path", "0"]
    together = ["--micro-batch", MICRO.get(name, "4"), "--dtype", "float64", "--drop-path", "0"]
    end = ["--stop-after", "3"]
    expected = run(name, data, tmp_path / "one", *alone, *end)
    ranks(run_on_a_rank, name, arguments(name, data, tmp_path / "two", *together, *end))
    log = read_log(tmp_path / "two")
    assert len(log) == len(expected) == 3
    for ours, theirs in zip(log, expected, strict=True):
        del ours["seconds"], theirs["seconds"]
        assert ours == pytest.approx(theirs, rel=1e-7)
    assert_same_weights(tmp_path / "two", tmp_path / "one")


def assert_same_weights(ours: Path, theirs: Path) -> None:
    """Adam divides by what may be almost 0, so weights differ more than gradients."""
    tensors, _ = checkpoint.read(ours / "last.safetensors")
    expected, _ = checkpoint.read(theirs / "last.safetensors")
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        if not key.startswith("rng."):
            torch.testing.assert_close(tensors[key], value, rtol=1e-5, atol=1e-7, msg=key)


def test_fsdp_equals_one_rank_and_goes_on_alone(
    data: dict[str, Path], tmp_path: Path, ranks: Ranks
) -> None:
    options = ["--dtype", "float64", "--ema", "0.9"]
    whole = [*options, "--micro-batch", "8"]
    run("imagenet", data, tmp_path / "one", *whole, "--stop-after", "6")
    sharded = [*options, "--micro-batch", "4", "--parallel", "fsdp", "--stop-after"]
    ranks(run_on_a_rank, "imagenet", arguments("imagenet", data, tmp_path / "two", *sharded, "3"))
    # On two sharded ranks again, and alone, from what the ranks have saved.
    more = arguments("imagenet", data, tmp_path / "two", *sharded, "5", "--resume")
    ranks(run_on_a_rank, "imagenet", more)
    run("imagenet", data, tmp_path / "two", *whole, "--resume", "--stop-after", "6")
    assert_same_weights(tmp_path / "two", tmp_path / "one")
    expected = read_log(tmp_path / "one")
    for ours, theirs in zip(read_log(tmp_path / "two"), expected, strict=True):
        del ours["seconds"], theirs["seconds"]
        assert ours == pytest.approx(theirs, rel=1e-7)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_trains_in_bfloat16(kind: str, data: dict[str, Path], tmp_path: Path, ranks: Ranks) -> None:
    """Each within a few roundings of float32, whatever casts: autocast or FSDP2's policy."""
    options = ["--micro-batch", "4", "--stop-after", "3"]
    expected = run("imagenet", data, tmp_path / "float32", *options)
    low = [*options, "--dtype", "bfloat16", "--parallel", kind]
    ranks(run_on_a_rank, "imagenet", arguments("imagenet", data, tmp_path / kind, *low))
    for ours, theirs in zip(read_log(tmp_path / kind), expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)
        assert ours["loss"] != theirs["loss"]


def test_torchrun_starts_the_script(data: dict[str, Path], tmp_path: Path) -> None:
    options = ["--micro-batch", "4", "--stop-after", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*command, EXAMPLES / "imagenet.py", *arguments("imagenet", data, tmp_path, *options)],
        check=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)},
    )
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2]


def test_a_signal_saves(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script("imagenet")
    from recipe import loop

    write = loop._Log.write

    def interrupt(self: Any, entry: dict[str, Any]) -> None:
        write(self, entry)
        if entry["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop._Log, "write", interrupt)
    log = run("imagenet", data, tmp_path, "--micro-batch", "8")
    assert len(log) == 3  # the step after the signal is finished
    assert checkpoint.read(tmp_path / "last.safetensors")[1]["step"] == 3


# What the recipes are.


def captured(name: str, given: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The arguments and the task of a script that is not run."""
    module = script(name)
    from recipe import loop

    found: list[Any] = []
    monkeypatch.setattr(loop, "train", lambda args, ranks, task: found.extend((args, task)))
    module.main(given)
    return found[0], found[1]


TABLE = {
    "convnest_atto": (0.0, 20),
    "convnest_femto": (0.0, 20),
    "convnest_pico": (0.0, 20),
    "convnest_nano": (0.0, 20),
    "convnest_tiny": (0.1, 20),
    "convnest_small": (0.4, 20),
    "convnest_base": (0.4, 20),
    "convnest_iso_atto": (0.0, 50),
    "convnest_iso_femto": (0.0, 50),
    "convnest_iso_pico": (0.0, 50),
    "convnest_iso_nano": (0.0, 50),
    "convnest_iso_tiny": (0.1, 50),
    "convnest_iso_small": (0.4, 50),
    "convnest_iso_base": (0.4, 50),
}


def test_every_model_has_its_recipe() -> None:
    recipes = script("imagenet").RECIPES
    assert {n: (r.drop_path, r.warmup_epochs) for n, r in recipes.items()} == TABLE
    assert set(TABLE) == set(list_models())


@pytest.mark.parametrize("name", ["convnest_tiny", "convnest_iso_pico"])
def test_imagenet_is_tables_9_and_10(
    name: str, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--model", name, "--data", str(data["folders"]), "--output", str(tmp_path)]
    args, task = captured("imagenet", given, monkeypatch)
    assert (args.epochs, args.batch, args.ema, args.image_size) == (300, 4096, 0.9999, 224)
    mixup = task.collate.mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.label_smoothing) == (0.8, 1.0, 0.1)
    assert (mixup.mix_prob, mixup.switch_prob) == (1.0, 0.5)
    drop_path, warmup = TABLE[name]
    assert max(m.drop_path for m in task.model.modules() if hasattr(m, "drop_path")) == (
        pytest.approx(drop_path)
    )
    text = str(task.dataset.transform)
    assert "RandAugment(n=2" in text and "RandomErasing(p=0.25, mode=pixel" in text
    policy = next(t for t in task.dataset.transform.transforms if "RandAugment" in str(t))
    assert {(op.magnitude, op.magnitude_std) for op in policy.ops} == {(9, 0.5)}

    from recipe.batches import Plan

    plan = Plan(images=1_281_167, batch=4096, micro_batch=128, world=8)
    assert (plan.accumulate, plan.steps_per_epoch, task.steps(plan)) == (4, 312, 300 * 312)
    optimizer = task.optimizer(task.model)
    assert isinstance(optimizer, torch.optim.AdamW)
    decays = {}
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.999)
        decays.update({id(p): group["weight_decay"] for p in group["params"]})
    for key, parameter in task.model.named_parameters():
        assert decays[id(parameter)] == (0.05 if parameter.dim() > 1 else 0), key
    schedule = task.schedule(optimizer, plan)
    for step, lr in (
        (1, 4e-3 / (warmup * 312)),
        (warmup * 312, 4e-3),
        ((warmup + 300) * 312 // 2, (4e-3 + 1e-6) / 2),
        (300 * 312, 1e-6),
    ):
        schedule.step_update(step)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(lr, rel=1e-3), step


def test_finetuning_decays_from_layer_to_layer(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--model", "convnest_atto", "--data", str(data["folders"]), "--output", str(tmp_path)]
    args, task = captured("finetune", [*given, "--weights", str(data["weights"])], monkeypatch)
    assert (args.image_size, args.lr, args.weight_decay) == (384, 5e-5, 1e-8)
    groups = task.optimizer(task.model).param_groups
    rates = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in task.model.named_parameters()}
    assert found["head.fc.weight"] == 1
    assert found["stages.3.blocks.1.mlp.fc1.weight"] == pytest.approx(0.7)
    assert found["stem.0.weight"] == pytest.approx(0.7**16)  # 15 blocks between
    weights = load_file(data["weights"])
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, weights[name]) != name.startswith("head.fc."), name


def scalar_nkd(s: list[float], t: list[float], target: int, gamma: float, heat: float) -> float:
    def softmax(logits: list[float]) -> list[float]:
        total = sum(math.exp(x) for x in logits)
        return [math.exp(x) / total for x in logits]

    first = -softmax(t)[target] * math.log(softmax(s)[target])
    others = [i for i in range(len(s)) if i != target]
    s_others = softmax([s[i] / heat for i in others])
    t_others = softmax([t[i] / heat for i in others])
    second = sum(p * math.log(q) for p, q in zip(t_others, s_others, strict=True))
    return first - gamma * heat**2 * second


@pytest.mark.parametrize(("gamma", "heat"), [(1.5, 1.0), (0.7, 2.5)])
def test_nkd_is_its_scalar_form(gamma: float, heat: float) -> None:
    script("imagenet")
    from recipe.nkd import nkd_loss

    student = (3 * torch.randn(6, 5, dtype=torch.float64)).requires_grad_()
    teacher = (3 * torch.randn(6, 5, dtype=torch.float64)).requires_grad_()
    labels = torch.tensor([0, 4, 2, 2, 1, 3])
    loss = nkd_loss(student, teacher, labels, gamma, heat)
    rows = zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True)
    expected = sum(scalar_nkd(s, t, i, gamma, heat) for s, t, i in rows) / 6
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda student: nkd_loss(student, teacher.detach(), labels, gamma, heat), student
    )
    loss.backward()
    assert teacher.grad is None
    assert nkd_loss(student.half(), teacher.half(), labels).dtype == torch.float32
    with pytest.raises(ValueError, match=r"labels must be \[6\], got \[5\]"):
        nkd_loss(student, teacher, labels[:5])
    with pytest.raises(ValueError, match=r"must both be \[N, K\], got \[6, 5\] and \[6, 4\]"):
        nkd_loss(student, teacher[:, :4], labels)


def test_a_teacher_sees_its_own_normalization() -> None:
    import timm

    distill = script("distill")
    model = timm.create_model("test_vit", num_classes=3).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}
    teacher = distill.Teacher(model)
    pixels = torch.rand(2, 3, 160, 160)

    def normalize(mean: Any, std: Any) -> torch.Tensor:
        return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    from recipe.classify import MEAN, STD

    expected = model(normalize((0.5, 0.4, 0.3), (0.1, 0.2, 0.3)))
    torch.testing.assert_close(teacher(normalize(MEAN, STD)), expected, rtol=1e-3, atol=1e-4)


def test_figures_of_detection_on_the_truth(data: dict[str, Path]) -> None:
    """The annotations, handed in as results, have an average precision of 1."""
    detect = script("detect")
    parser = detect.dense.parser("")
    args = parser.parse_args(["--data", str(data["coco"]), "--output", ".", "--model", "m"])
    dataset, coco = detect.open_coco(args, "val2017", train=False)
    found = []
    for _, target in (dataset[i] for i in range(2)):
        masks = target["masks"][:, None].float()
        scores = torch.linspace(0.9, 0.5, len(masks))
        boxes = torch.as_tensor(target["boxes"])
        result = {"boxes": boxes, "labels": target["labels"], "scores": scores, "masks": masks}
        found += detect.to_coco(target["image_id"], result)
    assert detect.average_precision(coco, found) == {"box_ap": 1.0, "mask_ap": 1.0}
    assert detect.average_precision(coco, found[:1])["box_ap"] < 0.7
    assert detect.average_precision(coco, [])["mask_ap"] == 0
    train, _ = detect.open_coco(args, "train2017", train=True)
    assert len(train) == 8  # the ninth has but a crowd


def test_figures_of_segmentation(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that reads the class off the colour that the test gives it."""
    masks = data["masks"]
    given = ["--model", "convnest_atto", "--data", str(masks), "--output", str(tmp_path)]
    given += ["--workers", "0", "--image-size", "64", "--classes", "3", "--channels", "64"]
    _, task = captured("segment", given, monkeypatch)
    import segment

    truth = [mask for _, mask in segment.Masks(*_validation(segment, given))]
    shown = iter(truth)

    class Perfect(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            mask = next(shown)
            known = mask.where(mask != 255, 0)
            return torch.nn.functional.one_hot(known, 3).permute(2, 0, 1)[None].float(), None

    assert task.evaluate(Perfect()) == {"miou": 1.0, "accuracy": 1.0}

    class Constant(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return torch.eye(3)[1].view(1, 3, 1, 1).expand(1, 3, 4, 4), None

    pixels = torch.cat([mask.flatten() for mask in truth])
    share = (pixels == 1).sum() / (pixels != 255).sum()
    present = len({1, *pixels.tolist()} - {255})
    figures = task.evaluate(Constant())
    assert figures["accuracy"] == pytest.approx(share.item())
    assert figures["miou"] == pytest.approx(share.item() / present)


def _validation(segment: Any, given: list[str]) -> tuple[Any, ...]:
    parser = segment.dense.parser("")
    args, _ = parser.parse_known_args(given)
    args.classes, args.count_zero, args.image_size = 3, False, 64
    return args, "validation", segment.transforms(args)[1]


# What cannot be.


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("imagenet", ["--model", "convnest_huge"], "--model must be one of convnest_atto"),
        (
            "imagenet",
            ["--micro-batch", "6", "--mix-batch", "2"],
            "--batch must be a multiple of --micro-batch",
        ),
        (
            "imagenet",
            ["--batch", "32", "--micro-batch", "8"],
            "--batch must be at most the number of training images",
        ),
        ("imagenet", ["--micro-batch", "8", "--mix-batch", "3"], "--mix-batch must be even"),
        ("imagenet", ["--micro-batch", "8", "--parallel", "fsdp"], "start it with torchrun"),
        ("imagenet", ["--micro-batch", "8", "--resume"], "no checkpoint at"),
        ("distill", ["--teacher-pretrained"], "either --teacher-pretrained or"),
        ("segment", ["--model", "convnest_iso_atto"], "--model must be a hierarchical one"),
        ("segment", ["--channels", "32"], "--channels must be a multiple of 64, got 32"),
        ("segment", ["--classes", "2", "--micro-batch", "4"], "--classes 2 is too few"),
        ("detect", ["--parallel", "fsdp"], "--parallel must be ddp for detection"),
    ],
)
def test_errors(
    name: str, more: list[str], message: str, data: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError if "checkpoint" not in message else TrainError, match=message):
        run(name, data, tmp_path / "output", *more)


def test_errors_of_folders(data: dict[str, Path], tmp_path: Path) -> None:
    wrong = {**data, "folders": data["folders"] / "train"}
    with pytest.raises(UsageError, match="--data must hold train/ and val/ class folders"):
        run("imagenet", wrong, tmp_path / "output", "--micro-batch", "8")
    options = ["--micro-batch", "8", "--stop-after", "1"]
    run("imagenet", data, tmp_path / "output", *options)
    with pytest.raises(UsageError, match=r"exists: add --resume, or take another --output"):
        run("imagenet", data, tmp_path / "output", *options)
    with pytest.raises(UsageError, match=r"cannot resume from .*: --lr was 0.0005, got 0.1"):
        run("imagenet", data, tmp_path / "output", *options, "--resume", "--lr", "0.1")
    with pytest.raises(TrainError, match=r"cannot load .*: the model has no stages.2.blocks.10"):
        path = tmp_path / "nano.safetensors"
        save_file(create_model("convnest_nano", 10).state_dict(), path)
        run("finetune", {**data, "weights": path}, tmp_path / "other", "--micro-batch", "8")
