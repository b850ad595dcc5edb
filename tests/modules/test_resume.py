"""An interrupted run resumes to the same bits: weights, state of the optimizer and of the schedule, metrics."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from faults import Dropping
from resume_check import SaveEach
from torch import Tensor, nn

from kd_lightning import Augmentation, DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.losses import ContrastiveLoss, HardTargetLoss, HintLoss
from kd_lightning.networks import ResNet

Trainers = Callable[..., pl.Trainer]
Modules = Callable[[], TeacherModule | DistillationModule]


def network(width: int = 4) -> ResNet:
    return ResNet([1, 1], [width, 2 * width], in_channels=1)


class Save(SaveEach):
    """A checkpoint after each validation too."""

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.save(trainer, f"epoch {trainer.current_epoch} validated")


def outcome(trainer: pl.Trainer) -> dict[str, Any]:
    """All that a run leaves, but for its speed."""
    found: dict[str, Any] = dict(trainer.lightning_module.state_dict())
    for number, group in enumerate(trainer.optimizers[0].state_dict()["state"].values()):
        found |= {f"optimizer {number} {name}": value for name, value in group.items()}
    found["rates"] = [group["lr"] for group in trainer.optimizers[0].param_groups]
    metrics = dict(trainer.callback_metrics)
    return found | {name: metrics[name] for name in sorted(metrics) if name != "train/images_per_second"}


def refuse_a_difference(found: dict[str, Any], expected: dict[str, Any], place: str) -> None:
    # what was logged before the cut, and is not computed again, is in the log of the run that was cut
    logged = {
        "epoch 2 validated": ("train/loss_step", "learning_rate", "val/"),
        "epoch 2 ended": ("train/", "val/", "l"),
    }
    before = logged.get(place, ("train/loss_step", "learning_rate") if place.startswith("epoch 2") else ())
    missing = [name for name in expected if name not in found and not name.startswith(before)]
    assert not missing, place
    for name, value in found.items():
        same = torch.equal(value, expected[name]) if isinstance(value, Tensor) else value == expected[name]
        assert same, f"{name} differs after {place}: {value} and {expected[name]}"


def distilled(losses: dict[str, Any] | None = None, **options: Any) -> DistillationModule:
    torch.manual_seed(5)
    teacher = network(8)
    torch.manual_seed(1)
    return DistillationModule(network(), teacher, losses=losses, teacher_check="off", **options)


def taught(build: Callable[[], nn.Module] = network, **options: Any) -> TeacherModule:
    torch.manual_seed(1)
    return TeacherModule(build(), **options)


def with_queue() -> DistillationModule:
    contrastive = ContrastiveLoss(queue_size=512, student_layers=["avgpool"], teacher_layers=["avgpool"])
    return distilled({"hard": HardTargetLoss(), "crd": contrastive})


def with_hint() -> DistillationModule:
    return distilled({"hard": HardTargetLoss(), "hint": HintLoss(student_layers=["layer1"], teacher_layers=["layer1"])})


steps: dict[str, Any] = {"lr_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1), "lr_interval": "epoch"}
CONFIGURATIONS: dict[str, tuple[Modules, dict[str, Any], dict[str, Any]]] = {
    "teacher": (taught, {}, {}),
    "distillation": (distilled, {}, {}),
    "learned regressor": (with_hint, {}, {}),
    "queue": (with_queue, {}, {}),
    "cached teacher": (partial(distilled, teacher_cache=True), {"views": 2}, {}),
    "dropout": (partial(taught, Dropping), {}, {}),
    "accumulation": (distilled, {}, {"accumulate_grad_batches": 2}),
    "accumulation over the end of an epoch": (distilled, {}, {"accumulate_grad_batches": 3}),
    "no validation, a schedule of epochs": (partial(taught, **steps), {}, {"limit_val_batches": 0}),
    "AdamW": (partial(taught, optimizer=torch.optim.AdamW, **steps), {}, {}),
    "mixup": (taught, {"augmentation": Augmentation(mixup=0.2)}, {}),
    "bfloat16": (distilled, {}, {"precision": "bf16-mixed"}),
    "validation within an epoch": (distilled, {}, {"val_check_interval": 2}),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_run_goes_on_from_anywhere_to_the_same_bits(name: str, make_trainer: Trainers, tmp_path: Path) -> None:
    build, data, options = CONFIGURATIONS[name]

    def run(callbacks: list[pl.Callback], path: Path | None = None) -> dict[str, Any]:
        trainer = make_trainer(max_epochs=3, callbacks=callbacks, **options)
        module = build()
        torch.manual_seed(1 if path is None else 99)  # whatever else a new process does
        trainer.fit(module, DigitsDataModule(batch_size=256, **data), ckpt_path=path, weights_only=True)
        return outcome(trainer)

    save = Save(tmp_path)
    whole = run([save])
    refuse_a_difference(run([]), whole, "no save at all")
    assert len(save.places) >= 3 * 5
    for place in save.places:
        refuse_a_difference(run([], place), whole, place.stem)
