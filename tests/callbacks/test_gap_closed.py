"""The part of the gap between the student alone and its teacher."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from kd_lightning import DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.callbacks import GapClosed
from kd_lightning.errors import UserError

Networks = Callable[..., nn.Module]
Trainers = Callable[..., pl.Trainer]


@pytest.fixture
def teacher(small: Networks, digits: DigitsDataModule, make_trainer: Trainers) -> nn.Module:
    network = small(8)
    make_trainer(max_epochs=3, limit_val_batches=0).fit(TeacherModule(network, learning_rate=0.3), digits)
    return network


def logged(folder: Path, name: str) -> list[float]:
    (file,) = folder.rglob("metrics.csv")
    head, *rows = (line.split(",") for line in file.read_text().splitlines())
    return [float(row[head.index(name)]) for row in rows if row[head.index(name)]]


def test_each_epoch_logs_the_part_of_the_gap(
    small: Networks, teacher: nn.Module, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    trainer = make_trainer(max_epochs=2, callbacks=[GapClosed(0.05)], logger=CSVLogger(tmp_path))
    trainer.fit(DistillationModule(small(), teacher), digits)
    (best,) = logged(tmp_path, "teacher/accuracy")
    expected = [(accuracy - 0.05) / (best - 0.05) for accuracy in logged(tmp_path, "val/accuracy")]
    assert len(expected) == 2
    assert logged(tmp_path, "val/gap_closed") == pytest.approx(expected, abs=1e-5)


def test_the_checkpoint_of_the_student_alone_gives_the_accuracy_of_its_best_epoch(
    small: Networks, teacher: nn.Module, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    best = ModelCheckpoint(tmp_path / "alone", monitor="val/accuracy", mode="max")
    make_trainer(max_epochs=3, callbacks=[best], enable_checkpointing=True).fit(TeacherModule(small()), digits)
    callback = GapClosed(best.best_model_path)
    make_trainer(callbacks=[callback]).fit(DistillationModule(small(), teacher), digits)
    assert best.best_model_score is not None
    assert callback.part(student=float(best.best_model_score), teacher=1.0) == 0
    assert callback.part(student=1.0, teacher=1.0) == 1


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0, 1.2])
def test_the_part_is_linear_in_the_student(part: float) -> None:
    alone, teacher = 0.6, 0.9
    assert GapClosed(alone).part(student=alone + part * (teacher - alone), teacher=teacher) == pytest.approx(part)


def test_a_teacher_that_is_no_better_than_the_student_alone_has_no_gap(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    trainer = make_trainer(callbacks=[GapClosed(1.0)], logger=CSVLogger(tmp_path))
    module = DistillationModule(small(), small(), teacher_check="off")
    with pytest.warns(UserWarning, match="val/gap_closed is not logged: the teacher's accuracy"):
        trainer.fit(module, digits)
    assert "gap_closed" not in next(tmp_path.rglob("metrics.csv")).read_text()


def test_what_has_no_gap_is_refused_before_the_first_step(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"alone must be an accuracy in \[0, 1\], or a checkpoint, got 80"):
        GapClosed(80)

    def fit(module: Any, alone: float | str = 0.5) -> None:
        make_trainer(callbacks=[GapClosed(alone)]).fit(module, digits)

    with pytest.raises(UserError, match="GapClosed compares with a teacher, but TeacherModule has none; remove it"):
        fit(TeacherModule(small()))
    other_classes = DistillationModule(small(), small(num_classes=7), losses=feature_losses())
    with pytest.raises(UserError, match="GapClosed compares accuracies, but the teacher has other classes"):
        fit(other_classes)
    with pytest.raises(UserError, match="is a folder; name the checkpoint of the student alone"):
        fit(DistillationModule(small(), small()), str(tmp_path))
    torch.save({"state_dict": small().state_dict()}, tmp_path / "weights.ckpt")
    with pytest.raises(UserError, match="does not contain the accuracy of its best epoch"):
        fit(DistillationModule(small(), small()), str(tmp_path / "weights.ckpt"))


def feature_losses() -> Any:
    from kd_lightning.losses import AttentionLoss, HardTargetLoss

    return {"hard": HardTargetLoss(), "maps": AttentionLoss(student_layers=["layer1"], teacher_layers=["layer1"])}
