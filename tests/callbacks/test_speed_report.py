"""A training says once what makes it fast, and what else could."""

from collections.abc import Callable

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import LearningRateFinder

from kd_lightning import DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.callbacks.freeze import FreezeLayers
from kd_lightning.networks import ResNet

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]


def _reports(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith("Speed: ")]


def test_a_search_for_the_learning_rate_does_not_report(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, caplog: pytest.LogCaptureFixture
) -> None:
    finder = LearningRateFinder(num_training_steps=15, min_lr=1e-3)
    with caplog.at_level("INFO"):
        make_trainer(callbacks=[finder], limit_train_batches=1).fit(TeacherModule(small()), digits)
    (report,) = _reports(caplog)
    assert report.startswith("Speed: trains on the CPU; precision 32-true (bf16-mixed is faster ")
    assert report.endswith("; the network is not compiled (compile=true may be faster in long runs).")


def test_the_teacher_and_the_cache_of_features_are_in_the_report(
    small: Networks, make_trainer: Trainers, caplog: pytest.LogCaptureFixture
) -> None:
    data = DigitsDataModule(batch_size=256, views=1)
    with caplog.at_level("INFO"):
        distillation = DistillationModule(small(), small(), teacher_check="off")
        make_trainer(limit_train_batches=1).fit(distillation, data)
        cached = TeacherModule(small(), feature_cache=True)
        make_trainer(limit_train_batches=1, callbacks=[FreezeLayers()]).fit(cached, data)
    with_teacher, with_cache = _reports(caplog)
    assert "the teacher runs in each step, in float32, batch norms folded" in with_teacher
    assert with_cache.endswith("the frozen layers run once for each view of an image.")
