"""A training says once what makes it fast, and after the first epoch what it waited for."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kd_lightning import AdaptationModule, DigitsDataModule, DistillationModule, DomainPairDataModule, TeacherModule
from kd_lightning.callbacks import speed_report
from kd_lightning.callbacks.freeze import FreezeLayers
from kd_lightning.data.augmentation.settings import Augmentation
from kd_lightning.data.image_set import Decoded, StreamedImages
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
    assert "; the network is not compiled (compile=true may be faster in long runs)" in report


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


# --- after the first epoch


class SlowImages(Dataset[tuple[Tensor, int]]):
    """Images that take a while to read, in seconds for each."""

    def __init__(self, seconds: float, count: int = 16) -> None:
        self.seconds = seconds
        self.images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        time.sleep(self.seconds)
        return self.images[index], index % 10


class SlowStep(TeacherModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        time.sleep(0.1)
        return super().training_step(batch, batch_idx)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge epochs of any duration."""
    monkeypatch.setattr(speed_report, "_SHORT", 0.0)


def _after_epoch(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [report for report in _reports(caplog) if " images/s in epoch " in report]


def _waiting(trainer: pl.Trainer) -> float:
    return float(trainer.callback_metrics["train/waiting_for_data"])


@pytest.mark.usefixtures("judged")
@pytest.mark.filterwarnings("ignore:.*(does not have many workers|no `val_dataloader`).*")
def test_slow_reading_is_named_with_the_workers_of_a_users_loader(
    small: Networks, make_trainer: Trainers, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(max_epochs=2)
    with caplog.at_level("INFO"):
        trainer.fit(TeacherModule(small()), DataLoader(SlowImages(0.02), batch_size=4))
    assert 0.5 < _waiting(trainer) <= 1
    (report,) = _after_epoch(caplog)  # of the first epoch only
    assert re.fullmatch(
        r"Speed: \d+ images/s in epoch 0, with \d+% of the time spent waiting for images; to train faster, raise "
        r"num_workers of the DataLoader \(0 now, \d+ cores?\)\.",
        report,
    )


@pytest.mark.usefixtures("judged")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_slow_steps_and_slow_validation_are_not_waiting(
    small: Networks, make_trainer: Trainers, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(val_check_interval=2, num_sanity_val_steps=2)
    loaders = DataLoader(SlowImages(0.0), batch_size=4), DataLoader(SlowImages(0.1, 4), batch_size=4)
    with caplog.at_level("INFO"):
        trainer.fit(SlowStep(small()), *loaders)
    assert _waiting(trainer) < 0.25
    (report,) = _after_epoch(caplog)
    assert report.endswith(" and the rest on training steps; to train faster, set model.compile to true for long runs.")
    assert float(trainer.callback_metrics["train/images_per_second"]) > 4  # 0.4 s of validation are not counted


@pytest.mark.usefixtures("judged")
def test_the_settings_of_the_data_module_and_of_the_teacher_are_named(
    small: Networks, make_trainer: Trainers, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(images: StreamedImages, *arguments: Any) -> Decoded:
        time.sleep(0.1)
        return stream(images, *arguments)

    def fit(module: pl.LightningModule, data: Any) -> str:
        caplog.clear()
        with caplog.at_level("INFO"):
            make_trainer(limit_train_batches=3).fit(module, data)
        return _after_epoch(caplog)[0].partition("to train faster, ")[2]

    def cut(**options: Any) -> DigitsDataModule:
        return DigitsDataModule(augmentation=Augmentation(resized_crop=True), **options)

    distillation = DistillationModule(small(), small(), teacher_check="off")
    compiled = "set model.compile to true for long runs."
    cached = "cache the teacher's logits (data.views with model.teacher_cache true), since it runs in each step"
    assert fit(SlowStep(small()), DigitsDataModule()) == compiled
    assert distillation.faster_steps() == [compiled.rstrip(".")]  # with a user's loaders nothing can be cached
    distillation.trainer = make_trainer()
    distillation.trainer.datamodule = DigitsDataModule()  # type: ignore[attr-defined]
    assert distillation.faster_steps() == [cached, compiled.rstrip(".")]

    stream = StreamedImages.stream
    monkeypatch.setattr(StreamedImages, "stream", slow)
    assert fit(TeacherModule(small()), cut()).startswith("raise data.num_workers (0 now, ")
    pair = DomainPairDataModule(cut(), cut(num_workers=0))
    assert re.match(
        r"raise data\.source\.num_workers \(0 now, \d+ cores?\), or raise data\.target\.num_workers",
        fit(AdaptationModule(small()), pair),
    )


def test_a_short_epoch_is_not_judged(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(limit_train_batches=2)
    with caplog.at_level("INFO"):
        trainer.fit(TeacherModule(small()), digits)
    assert not _after_epoch(caplog)
    assert 0 <= _waiting(trainer) <= 1


def test_a_compiled_network_and_cached_logits_are_not_named(small: Networks, make_trainer: Trainers) -> None:
    assert TeacherModule(small(), compile=True).faster_steps() == []
    module = DistillationModule(small(), small(), teacher_check="off", teacher_cache=True)
    make_trainer(limit_train_batches=1).fit(module, DigitsDataModule(batch_size=256, views=1))
    assert module.faster_steps() == ["set model.compile to true for long runs"]


@pytest.mark.usefixtures("judged")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_the_first_step_and_its_batch_are_left_out(
    small: Networks, make_trainer: Trainers, caplog: pytest.LogCaptureFixture
) -> None:
    class SlowFirstStep(TeacherModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            time.sleep(0.05 if batch_idx else 1)  # as if it were compiled
            return super().training_step(batch, batch_idx)

    class SlowFirstImage(SlowImages):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            time.sleep(0.0 if index else 1)
            return super().__getitem__(index)

    loader = DataLoader(SlowFirstImage(0.0), batch_size=4)
    trainer = make_trainer(num_sanity_val_steps=0)
    with caplog.at_level("INFO"):
        trainer.fit(SlowFirstStep(small()), loader, DataLoader(SlowImages(0.0), batch_size=4))
    (report,) = _after_epoch(caplog)
    found = re.match(r"Speed: (\d+) images/s in epoch 0, with (\d+)% of the time spent waiting", report)
    assert found is not None
    assert int(found[1]) > 2 * float(trainer.callback_metrics["train/images_per_second"])
    assert int(found[2]) < 25


class WriteSpeed(pl.Callback):
    """Writes what each rank measured of an epoch, and printed."""

    def __init__(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.folder = folder
        self.caplog = caplog

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        metrics = pl_module.epoch_metrics
        speed = metrics.speed(trainer)
        state = {"speed": tuple(speed), "own": metrics.seconds - metrics._first_step.seconds}
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        path = self.folder / f"{trainer.global_rank}.pt"
        state = torch.load(path)
        torch.save({**state, "logged": _waiting(trainer), "printed": len(_after_epoch(self.caplog))}, path)


@pytest.mark.usefixtures("judged")
@pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded|barrier|does not have many workers|sync_dist).*")
@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*")
def test_all_images_of_all_ranks_are_counted_and_one_line_is_printed(
    small: Networks, make_trainer: Trainers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2, "accumulate_grad_batches": 2}
    trainer = make_trainer(callbacks=[WriteSpeed(tmp_path, caplog)], **options)
    with caplog.at_level("INFO"):
        trainer.fit(TeacherModule(small()), DataLoader(SlowImages(0.02, 32), batch_size=4))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert ranks[0]["speed"] == ranks[1]["speed"]
    images_per_second, seconds, waiting, _ = ranks[0]["speed"]
    assert seconds == pytest.approx((ranks[0]["own"] + ranks[1]["own"]) / 2)
    assert images_per_second * seconds == pytest.approx(32 - 2 * 4)  # without the first batch of each
    assert 0.3 < waiting <= 1
    assert ranks[0]["logged"] == ranks[1]["logged"]
    assert [rank["printed"] for rank in ranks] == [1, 0]


def test_a_resumed_epoch_continues_to_measure(small: Networks, make_trainer: Trainers, tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    make_trainer(callbacks=[Save()]).fit(TeacherModule(small()), DigitsDataModule(batch_size=256))
    content = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert 0 < content["epoch_metrics"]["waiting"] < content["epoch_metrics"]["seconds"]
    for waiting in (900.0, None):
        content["epoch_metrics"] |= {"seconds": 1000.0, "waiting": waiting}
        if waiting is None:  # as older versions saved it
            del content["epoch_metrics"]["waiting"]
        torch.save(content, tmp_path / "saved.ckpt")
        trainer = make_trainer()
        trainer.fit(TeacherModule(small()), DigitsDataModule(batch_size=256), ckpt_path=tmp_path / "saved.ckpt")
        assert _waiting(trainer) == pytest.approx((waiting or 0) / 1000, abs=0.05)
