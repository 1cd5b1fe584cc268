"""The scripts of examples/: every value is the paper's, every loss and figure its definition."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convnest_kernels.models import list_models
from tests.recipe_runs import WARNINGS, captured, data, script
from tests.training import one_thread

__all__ = ["data", "one_thread"]  # fixtures

pytestmark = WARNINGS

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


@pytest.mark.parametrize("script_name", ["imagenet", "distill"])
@pytest.mark.parametrize("name", TABLE)
def test_training_is_tables_9_and_10(
    name: str,
    script_name: str,
    data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Distillation is the same run with another loss."""
    given = ["--model", name, "--data", str(data["folders"]), "--output", str(tmp_path)]
    if script_name == "distill":
        given += ["--teacher", "test_convnext", "--teacher-weights", str(data["teacher"])]
    args, task = captured(script_name, given, monkeypatch)
    if script_name == "distill":
        assert (args.nkd_gamma, args.nkd_temperature) == (1.5, 1.0)
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
