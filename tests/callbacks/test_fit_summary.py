"""`fit.json`: what a training has reached, what it cost, and on what the time was spent."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kd_lightning import DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.callbacks import FitSummary
from kd_lightning.callbacks.run_cost import RunCost, describe_cost
from kd_lightning.networks import ResNet

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]


class Slow(nn.Module):
    """A network that takes a while in each step."""

    def __init__(self, network: nn.Module, seconds: float) -> None:
        super().__init__()
        self.network, self.seconds = network, seconds

    def forward(self, images: Tensor) -> Tensor:
        if bool(images.isfinite().all()):  # which cannot be traced, so that the teacher's folded copy keeps the pause
            time.sleep(self.seconds)
        logits: Tensor = self.network(images)
        return logits


class Stop(pl.Callback):
    """Raises in a step."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "fit.json").read_text())
    return content


def test_the_teacher_and_the_student_have_their_shares(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    summary = FitSummary()
    module = DistillationModule(Slow(small(), 0.02), Slow(small(8), 0.06), teacher_check="off")
    trainer = make_trainer(callbacks=[summary], max_epochs=2, limit_val_batches=0)
    trainer.fit(module, digits)
    steps, cost = trainer.global_step, summary.cost
    assert steps * 0.06 <= cost.teacher < cost.training <= cost.seconds
    assert cost.training - cost.teacher - cost.waiting > steps * 0.02
    assert cost.caching == 0


def test_a_cached_teacher_counts_once_a_view(small: Networks, make_trainer: Trainers) -> None:
    summary = FitSummary()
    data = DigitsDataModule(batch_size=256, views=1)
    module = DistillationModule(small(), Slow(small(8), 0.05), teacher_check="off", teacher_cache=True)
    make_trainer(callbacks=[summary], max_epochs=3, limit_val_batches=0).fit(module, data)
    assert summary.cost.caching >= 0.05
    assert summary.cost.teacher < 0.05, "steps read the cache"
    assert summary.cost.training < summary.cost.seconds - summary.cost.caching


def test_the_waits_for_images_count_in_all_epochs(small: Networks, make_trainer: Trainers) -> None:
    class SlowImages(Dataset[tuple[Tensor, int]]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            time.sleep(0.005)
            return torch.zeros(1, 8, 8), index % 10

    summary = FitSummary()
    loader = DataLoader(SlowImages(), batch_size=8, num_workers=0)
    make_trainer(callbacks=[summary], max_epochs=2, limit_val_batches=0).fit(TeacherModule(small()), loader, loader)
    assert 80 * 0.005 <= summary.cost.waiting <= summary.cost.training


def test_the_metrics_are_those_of_the_best_epoch(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/accuracy", mode="max")
    options: dict[str, Any] = {"callbacks": [FitSummary(), best], "enable_checkpointing": True, "max_epochs": 4}
    make_trainer(**options).fit(TeacherModule(small()), digits)
    content = read(tmp_path)
    assert best.best_model_score is not None
    assert content["val"]["accuracy"] == pytest.approx(float(best.best_model_score), abs=1e-6)
    assert (content["epochs"], content["planned_epochs"], content["finished"]) == (4, 4, True)
    assert content["monitor"] == "val/accuracy"


def keep_last(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "kept", filename="last", save_on_train_epoch_end=True, enable_version_counter=False)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("error", [RuntimeError("lost"), SystemExit(130)])
def test_an_interrupted_training_has_a_file_that_a_resumed_one_continues(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path, error: BaseException
) -> None:
    options: dict[str, Any] = {"enable_checkpointing": True, "max_epochs": 3}
    trainer = make_trainer(callbacks=[FitSummary(), keep_last(tmp_path), Stop(7, error)], **options)
    with pytest.raises(type(error)):
        trainer.fit(TeacherModule(small()), digits)
    cut = read(tmp_path)
    assert (cut["finished"], cut["steps"]) == (False, 7)
    make_trainer(callbacks=[FitSummary(), keep_last(tmp_path)], **options).fit(
        TeacherModule(small()), digits, ckpt_path=str(tmp_path / "kept/last.ckpt"), weights_only=True
    )
    resumed = read(tmp_path)
    assert (resumed["finished"], resumed["epochs"], resumed["begun"]) == (True, 3, cut["begun"])
    assert resumed["cost"]["seconds"] > cut["cost"]["seconds"]
    assert resumed["cost"]["training"] > cut["cost"]["training"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_damaged_file_is_begun_again(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    for epochs in (1, 2):
        trainer = make_trainer(
            callbacks=[FitSummary(), keep_last(tmp_path)], enable_checkpointing=True, max_epochs=epochs
        )
        resumed: dict[str, Any] = (
            {"ckpt_path": str(tmp_path / "kept/last.ckpt"), "weights_only": True} if epochs > 1 else {}
        )
        trainer.fit(TeacherModule(small()), digits, **resumed)
        assert read(tmp_path)["epochs"] == epochs
        (tmp_path / "fit.json").write_text('{"cost": {"seconds"')


def test_the_sentence_adds_up() -> None:
    text = describe_cost(RunCost(100.0, 70.0, 5.0, 20.0, 10.0), has_teacher=True)
    assert text == (
        "The training took 2 min: 5% waiting for images, 30% the teacher, 45% the student, 20% validation and the rest."
    )
    assert "teacher" not in describe_cost(RunCost(), has_teacher=False, student="network")
