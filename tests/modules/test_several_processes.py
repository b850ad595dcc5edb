"""Several processes on one machine: the same mathematics, every sample counted once."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from kd_lightning import DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.data.image_set import ImageSet
from kd_lightning.losses import DistillationLoss, HardTargetLoss, RelationalLoss, SimilarityLoss
from kd_lightning.networks import ResNet

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded).*"),
    pytest.mark.filterwarnings("ignore:.*barrier.*"),
    pytest.mark.filterwarnings("ignore:.*nn.parallel.*"),
]

STEPS = 20


class Keeper(pl.Callback):
    """Writes what a rank saw to a file, where the parent process can read it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.curve: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.curve.append(outputs["loss"].detach().clone())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        teacher = getattr(pl_module, "teacher", None) or nn.Identity()
        state = {"weights": pl_module.state_dict(), "teacher": teacher.state_dict(), "curve": torch.stack(self.curve)}
        if trainer.world_size > 1:  # what DDP's wrapper reduces and sends
            assert trainer.model is not None
            assert not any("teacher" in name for name in trainer.model.state_dict())
            assert not any("teacher" in name for name, _ in trainer.model.named_buffers())
        torch.save({**state, "figures": dict(trainer.callback_metrics)}, self.folder / f"{trainer.global_rank}.pt")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._keep_figures(trainer, pl_module, "validate")

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._keep_figures(trainer, pl_module, "test")

    def _keep_figures(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        state = {"figures": dict(trainer.callback_metrics), "confusion": pl_module.confusion}
        torch.save(state, self.folder / f"{stage}{trainer.global_rank}.pt")


def _frozen_norms(network: nn.Module) -> nn.Module:
    """Without batch statistics, so that a batch may be cut into two without a change of the mathematics."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(1, child.num_features))
    return network


def _beside_labels(loss: DistillationLoss) -> dict[str, DistillationLoss]:
    return {"hard": HardTargetLoss(), "relation": loss}


MODULES: dict[str, Callable[[nn.Module, nn.Module], pl.LightningModule]] = {
    "labels alone": lambda student, teacher: TeacherModule(student),
    "KD": lambda student, teacher: DistillationModule(student, teacher, teacher_check="off"),
    # the losses of a batch see the batch of all processes
    "SimilarityLoss": lambda student, teacher: DistillationModule(
        student, teacher, losses=_beside_labels(SimilarityLoss(student_layers=["layer2"])), teacher_check="off"
    ),
    # at ten times the rate one process differs as much from itself where one weight is rounded in another way
    "RelationalLoss": lambda student, teacher: DistillationModule(
        student, teacher, losses=_beside_labels(RelationalLoss()), teacher_check="off", learning_rate=0.01
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_two_processes_equal_one(name: str, small: Networks, make_trainer: Trainers, tmp_path: Path) -> None:
    student, teacher = _frozen_norms(small()), small(8)
    results = {}
    for world, batch_size in ((1, 114), (2, 57)):
        folder = tmp_path / str(world)
        folder.mkdir()
        options = {"strategy": "ddp_fork", "devices": 2} if world == 2 else {"devices": 1}
        trainer = make_trainer(callbacks=[Keeper(folder)], max_epochs=2, num_sanity_val_steps=0, **options)
        module = MODULES[name](copy.deepcopy(student), teacher)
        trainer.fit(module, DigitsDataModule(batch_size=batch_size))
        results[world] = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
    (one,), (first, second) = results[1], results[2]
    assert len(one["curve"]) == len(first["curve"]) == STEPS
    torch.testing.assert_close((first["curve"] + second["curve"]) / 2, one["curve"], rtol=1e-5, atol=0)
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), f"the ranks differ in {key}"
        expected = one["weights"][key]
        assert (value - expected).norm() <= 1e-4 * expected.norm(), key
    for key, value in first["teacher"].items():
        assert torch.equal(teacher.state_dict()[key], value)
        assert torch.equal(second["teacher"][key], value)
    figures = {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/ece", "val/agreement"}
    for figure in figures & set(one["figures"]):
        torch.testing.assert_close(first["figures"][figure], one["figures"][figure], rtol=1e-4, atol=1e-5)
        assert torch.equal(first["figures"][figure], second["figures"][figure])


class Odd(DigitsDataModule):
    """Sets that neither two nor three processes can share evenly: 287 images to validate on, 355 to test."""

    def load(self, split: str) -> ImageSet | None:
        images = super().load(split)
        if split != "test":
            return images
        assert images is not None
        assert images.pixels is not None
        return ImageSet(images.labels[:355], images.pixels[:355])

    def labels(self, stage: str) -> Tensor:
        self.setup("fit" if stage == "validate" else stage)
        return self.splits["test"].labels if stage == "test" else self.splits["train"].labels[self.splits.val_samples]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_every_image_is_counted_once(
    stage: str, world: int, small: Networks, make_trainer: Trainers, tmp_path: Path
) -> None:
    module, labels = DistillationModule(small(), small(8)), Odd().labels(stage)
    assert all(len(labels) % divisor for divisor in (2, 3, 8))
    expected = getattr(make_trainer(), stage)(module, Odd(batch_size=len(labels)))[0]
    options = {"strategy": "ddp_fork", "devices": world} if world > 1 else {}
    trainer = make_trainer(callbacks=[Keeper(tmp_path)], **options)
    getattr(trainer, stage)(module, Odd(batch_size=8))
    for rank in range(world):
        found = torch.load(tmp_path / f"{stage}{rank}.pt", weights_only=True)
        assert torch.equal(found["confusion"].sum(1), labels.bincount(minlength=10))
        for name, value in expected.items():
            assert float(found["figures"][name]) == pytest.approx(value, abs=1e-6), name
