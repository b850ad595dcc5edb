"""An interrupted run resumes to identical weights, optimizer and scheduler state, and metrics."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from mostly_slow import mostly_slow
from resume_check import SaveAfterBatchesAndEpochs
from torch import Tensor, nn
from unusual_networks import WithDropout

from kd_lightning import Augmentation, DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.losses import ContrastiveLoss, HardTargetLoss, HintLoss
from kd_lightning.networks import ResNet

Trainers = Callable[..., pl.Trainer]
Modules = Callable[[], TeacherModule | DistillationModule]


def network(width: int = 4) -> ResNet:
    return ResNet([1, 1], [width, 2 * width], in_channels=1)


class SaveAfterValidationToo(SaveAfterBatchesAndEpochs):
    """Saves a checkpoint after each validation too."""

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.save(trainer, f"epoch {trainer.current_epoch} validated")


def final_state(trainer: pl.Trainer) -> dict[str, Any]:
    """Return weights, optimizer state, learning rates, and all metrics but the speed."""
    found: dict[str, Any] = dict(trainer.lightning_module.state_dict())
    for number, group in enumerate(trainer.optimizers[0].state_dict()["state"].values()):
        found |= {f"optimizer {number} {name}": value for name, value in group.items()}
    found["rates"] = [group["lr"] for group in trainer.optimizers[0].param_groups]
    metrics = dict(trainer.callback_metrics)
    return found | {
        name: metrics[name]
        for name in sorted(metrics)
        if name not in ("train/images_per_second", "train/waiting_for_data")
    }


def assert_same_state(found: dict[str, Any], expected: dict[str, Any], when: str) -> None:
    # values that were logged before the interruption are not logged again
    logged = {
        "epoch 2 validated": ("train/loss_step", "learning_rate", "val/"),
        "epoch 2 ended": ("train/", "val/", "l"),
    }
    logged_before = logged.get(when, ("train/loss_step", "learning_rate") if when.startswith("epoch 2") else ())
    missing = [name for name in expected if name not in found and not name.startswith(logged_before)]
    assert not missing, when
    for name, value in found.items():
        same = torch.equal(value, expected[name]) if isinstance(value, Tensor) else value == expected[name]
        assert same, f"{name} differs after {when}: {value} and {expected[name]}"


def distillation_module(losses: dict[str, Any] | None = None, **options: Any) -> DistillationModule:
    torch.manual_seed(5)
    teacher = network(8)
    torch.manual_seed(1)
    return DistillationModule(network(), teacher, losses=losses, teacher_check="off", **options)


def teacher_module(build: Callable[[], nn.Module] = network, **options: Any) -> TeacherModule:
    torch.manual_seed(1)
    return TeacherModule(build(), **options)


def distillation_with_queue() -> DistillationModule:
    contrastive = ContrastiveLoss(queue_size=512, student_layers=["avgpool"], teacher_layers=["avgpool"])
    return distillation_module({"hard": HardTargetLoss(), "crd": contrastive})


def distillation_with_hint() -> DistillationModule:
    return distillation_module(
        {"hard": HardTargetLoss(), "hint": HintLoss(student_layers=["layer1"], teacher_layers=["layer1"])}
    )


epoch_schedule: dict[str, Any] = {
    "lr_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1),
    "lr_interval": "epoch",
}
CONFIGURATIONS: dict[str, tuple[Modules, dict[str, Any], dict[str, Any]]] = {
    "teacher": (teacher_module, {}, {}),
    "distillation": (distillation_module, {}, {}),
    "learned regressor": (distillation_with_hint, {}, {}),
    "queue": (distillation_with_queue, {}, {}),
    "cached teacher": (partial(distillation_module, teacher_cache=True), {"views": 2}, {}),
    "dropout": (partial(teacher_module, WithDropout), {}, {}),
    "accumulation": (distillation_module, {}, {"accumulate_grad_batches": 2}),
    "accumulation over the end of an epoch": (distillation_module, {}, {"accumulate_grad_batches": 3}),
    "no validation, a schedule of epochs": (partial(teacher_module, **epoch_schedule), {}, {"limit_val_batches": 0}),
    "AdamW": (partial(teacher_module, optimizer=torch.optim.AdamW, **epoch_schedule), {}, {}),
    "mixup": (teacher_module, {"augmentation": Augmentation(mixup=0.2)}, {}),
    "bfloat16": (distillation_module, {}, {"precision": "bf16-mixed"}),
    "validation within an epoch": (distillation_module, {}, {"val_check_interval": 2}),
}


@pytest.mark.parametrize(
    "name", mostly_slow(CONFIGURATIONS, "distillation", "queue", "cached teacher", "accumulation", "mixup")
)
def test_a_run_resumes_from_every_checkpoint_to_identical_state(
    name: str, make_trainer: Trainers, tmp_path: Path
) -> None:
    build, data, options = CONFIGURATIONS[name]

    def run(callbacks: list[pl.Callback], path: Path | None = None) -> dict[str, Any]:
        trainer = make_trainer(max_epochs=3, callbacks=callbacks, **options)
        module = build()
        torch.manual_seed(1 if path is None else 99)  # a new process has another seed
        trainer.fit(module, DigitsDataModule(batch_size=256, **data), ckpt_path=path, weights_only=True)
        return final_state(trainer)

    saver = SaveAfterValidationToo(tmp_path)
    expected = run([saver])
    assert_same_state(run([]), expected, "a run without checkpoints")
    assert len(saver.paths) >= 3 * 5
    for path in saver.paths:
        assert_same_state(run([], path), expected, path.stem)
