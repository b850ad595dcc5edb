"""Training and evaluation in several processes give the results of one process."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from made_photographs import photograph
from mostly_slow import mostly_slow
from torch import Tensor, nn
from unusual_networks import with_group_norms

from kd_lightning import Augmentation, DigitsDataModule, DistillationModule, ImageFolderDataModule, TeacherModule
from kd_lightning.data import Batch
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


class WriteRankResults(pl.Callback):
    """Writes losses, weights and metrics of a rank to a file that the parent process can read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach().clone())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        teacher = getattr(pl_module, "teacher", None) or nn.Identity()
        state = {"weights": pl_module.state_dict(), "teacher": teacher.state_dict(), "losses": torch.stack(self.losses)}
        if trainer.world_size > 1:  # the teacher is no part of what DDP synchronizes
            assert trainer.model is not None
            assert not any("teacher" in name for name in trainer.model.state_dict())
            assert not any("teacher" in name for name, _ in trainer.model.named_buffers())
        torch.save({**state, "metrics": dict(trainer.callback_metrics)}, self.folder / f"{trainer.global_rank}.pt")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._write_metrics(trainer, pl_module, "validate")

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._write_metrics(trainer, pl_module, "test")

    def _write_metrics(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        state = {"metrics": dict(trainer.callback_metrics), "confusion": pl_module.confusion}
        torch.save(state, self.folder / f"{stage}{trainer.global_rank}.pt")


def _with_hard_target(loss: DistillationLoss) -> dict[str, DistillationLoss]:
    return {"hard": HardTargetLoss(), "relation": loss}


MODULES: dict[str, Callable[[nn.Module, nn.Module], pl.LightningModule]] = {
    "without a teacher": lambda student, teacher: TeacherModule(student),
    "KD": lambda student, teacher: DistillationModule(student, teacher, teacher_check="off"),
    "KD on mixed images": lambda student, teacher: DistillationModule(student, teacher, teacher_check="off"),
    # losses that compare samples gather the batch of all processes
    "SimilarityLoss": lambda student, teacher: DistillationModule(
        student, teacher, losses=_with_hard_target(SimilarityLoss(student_layers=["layer2"])), teacher_check="off"
    ),
    # at ten times the learning rate, rounding a single weight differently changes a run of one process as much
    "RelationalLoss": lambda student, teacher: DistillationModule(
        student, teacher, losses=_with_hard_target(RelationalLoss()), teacher_check="off", learning_rate=0.01
    ),
}


@pytest.mark.parametrize("name", mostly_slow(MODULES, "KD on mixed images", "SimilarityLoss"))
def test_two_processes_equal_one(name: str, small: Networks, make_trainer: Trainers, tmp_path: Path) -> None:
    student, teacher = with_group_norms(small()), small(8)
    results = {}
    for world, batch_size in ((1, 114), (2, 57)):
        folder = tmp_path / str(world)
        folder.mkdir()
        options = {"strategy": "ddp_fork", "devices": 2} if world == 2 else {"devices": 1}
        trainer = make_trainer(callbacks=[WriteRankResults(folder)], max_epochs=2, num_sanity_val_steps=0, **options)
        module = MODULES[name](copy.deepcopy(student), teacher)
        augmentation = Augmentation(preset="strong" if "mixed" in name else None)
        trainer.fit(module, DigitsDataModule(batch_size=batch_size, augmentation=augmentation))
        results[world] = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
    (single,), (first, second) = results[1], results[2]
    assert len(single["losses"]) == len(first["losses"]) == STEPS
    torch.testing.assert_close((first["losses"] + second["losses"]) / 2, single["losses"], rtol=1e-5, atol=0)
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), f"the ranks differ in {key}"
        expected = single["weights"][key]
        assert (value - expected).norm() <= 1e-4 * expected.norm(), key
    for key, value in first["teacher"].items():
        assert torch.equal(teacher.state_dict()[key], value)
        assert torch.equal(second["teacher"][key], value)
    metrics = {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/ece", "val/agreement"}
    for name in metrics & set(single["metrics"]):
        torch.testing.assert_close(first["metrics"][name], single["metrics"][name], rtol=1e-4, atol=1e-5)
        assert torch.equal(first["metrics"][name], second["metrics"][name])


class WriteImages(pl.Callback):
    """Writes what a rank sees: the images of the student and of the teacher and the labels, by epoch and sample."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: dict[tuple[str, int, int], list[Tensor]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self._keep("train", trainer.current_epoch, batch)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self._keep("val", trainer.current_epoch, batch)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        torch.save(self.seen, self.folder / f"{trainer.global_rank}.pt")

    def _keep(self, split: str, epoch: int, batch: Batch) -> None:
        assert batch.teacher_images is not None
        for row, sample in enumerate(batch.ids.tolist()):
            assert (split, epoch, sample) not in self.seen
            shown = batch.images[row], batch.teacher_images[row], batch.labels[row]
            self.seen[split, epoch, sample] = [value.clone() for value in shown]


def test_two_processes_see_the_photographs_of_one(make_trainer: Trainers, tmp_path: Path) -> None:
    """... decoded into memory by one, and into a file that both map by two; in batches of the same images."""
    for number in range(28):
        folder = tmp_path / "photos" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        photograph(40 + number, 66 - number, seed=number).save(folder / f"{number}.png")
    network = ResNet([1, 1, 1], [2, 4, 8], num_classes=2)
    seen: dict[int, list[dict[tuple[str, int, int], list[Tensor]]]] = {}
    for world, batch_size in ((1, 8), (2, 4)):
        results = tmp_path / str(world)
        results.mkdir()
        options = {"strategy": "ddp_fork", "devices": 2} if world == 2 else {"devices": 1}
        trainer = make_trainer(callbacks=[WriteImages(results)], max_epochs=2, num_sanity_val_steps=0, **options)
        data = ImageFolderDataModule(
            str(tmp_path / "photos"),
            image_size=24,
            teacher_size=32,
            batch_size=batch_size,
            augmentation=Augmentation(preset="strong"),
        )
        trainer.fit(DistillationModule(with_group_norms(copy.deepcopy(network)), network, teacher_check="off"), data)
        assert (tmp_path / "photos/.kd_lightning").is_dir() == (world == 2)
        seen[world] = [torch.load(results / f"{rank}.pt", weights_only=True) for rank in range(world)]
    (single,), (first, second) = seen[1], seen[2]
    assert not first.keys() & second.keys()
    both = first | second
    assert both.keys() == single.keys()
    assert len([key for key in single if key[0] == "train"]) == 2 * 24
    for key, values in single.items():
        assert all(torch.equal(a, b) for a, b in zip(values, both[key], strict=True)), key


class IndivisibleDigits(DigitsDataModule):
    """Splits whose size is divisible by neither 2 nor 3: 287 validation images, 355 test images."""

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
def test_every_image_is_evaluated_once(
    stage: str, world: int, small: Networks, make_trainer: Trainers, tmp_path: Path
) -> None:
    module, labels = DistillationModule(small(), small(8)), IndivisibleDigits().labels(stage)
    assert all(len(labels) % divisor for divisor in (2, 3, 8))
    expected = getattr(make_trainer(), stage)(module, IndivisibleDigits(batch_size=len(labels)))[0]
    options = {"strategy": "ddp_fork", "devices": world} if world > 1 else {}
    trainer = make_trainer(callbacks=[WriteRankResults(tmp_path)], **options)
    getattr(trainer, stage)(module, IndivisibleDigits(batch_size=8))
    for rank in range(world):
        results = torch.load(tmp_path / f"{stage}{rank}.pt", weights_only=True)
        assert torch.equal(results["confusion"].sum(1), labels.bincount(minlength=10))
        for name, value in expected.items():
            assert float(results["metrics"][name]) == pytest.approx(value, abs=1e-6), name
