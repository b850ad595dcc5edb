import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DigitsDataModule, DistillationModule, DomainPairDataModule, TeacherModule
from kd_lightning.callbacks import TensorBoardImages
from kd_lightning.callbacks.image_grid import image_grid, label_captions
from kd_lightning.data.augmentation.settings import Augmentation
from kd_lightning.data.batch import Batch
from kd_lightning.networks import ResNet

Networks = Callable[..., nn.Module]
Trainers = Callable[..., pl.Trainer]


def events(trainer: pl.Trainer) -> EventAccumulator:
    found = EventAccumulator(str(trainer.log_dir))
    found.Reload()
    return found


def hyper_parameter_metrics(found: EventAccumulator) -> set[str]:
    """Return the metrics for which TensorBoard's table of hyper-parameters has columns."""
    content = found.PluginTagToContent("hparams")["_hparams_/experiment"]
    return {info.name.tag for info in HParamsPluginData.FromString(content).experiment.metric_infos}


def picture(found: EventAccumulator, tag: str) -> np.ndarray:
    (event,) = found.Images(tag)
    assert (event.step == 0) == (not tag.startswith("val/"))
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> tuple[EventAccumulator, dict[str, float], list[Any]]:
    """TensorBoard's events of one epoch of distillation and a test, the test metrics, and the training batches."""
    torch.manual_seed(0)
    seen: list[Any] = []

    class KeepImages(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch)

    student, teacher = (ResNet(blocks=[1, 1], widths=[w, 2 * w], in_channels=1) for w in (4, 8))
    module = DistillationModule(student, teacher, learning_rate=0.1, temperature=3.0, alpha=0.5, teacher_check="off")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=TensorBoardLogger(tmp_path_factory.mktemp("logs"), default_hp_metric=False),  # as on the command line
        callbacks=[TensorBoardImages(images=12, teacher_images=4), KeepImages()],
    )
    data = DigitsDataModule(batch_size=256)
    trainer.fit(module, data)
    metrics = dict(trainer.test(module, data, verbose=False)[0])
    return events(trainer), metrics, seen


def test_each_image_is_logged_once(distilled: Any) -> None:
    assert set(distilled[0].Tags()["images"]) == {
        *("train/images", "train/views", "teacher/softened"),
        *("val/confusion", "val/per_class", "test/confusion", "test/per_class"),
    }
    for tag in distilled[0].Tags()["images"]:
        assert picture(distilled[0], tag).std() > 0


def assert_shows(shown: np.ndarray, pixels: Tensor, captions: list[str]) -> None:
    """Check that a grid shows images in [0, 1] with their captions."""
    expected = np.asarray(image_grid(pixels, captions)).astype(int)
    assert shown.shape == expected.shape
    assert np.abs(shown - expected).max() <= 1


def test_the_grid_shows_the_first_batch_before_normalization_and_its_classes(distilled: Any) -> None:
    found, _, (first, *_) = distilled
    pixels = (first.images[:12] * 0.376 + 0.305).clamp(0, 1)
    assert_shows(picture(found, "train/images"), pixels, [str(label) for label in first.labels[:12].tolist()])


def test_the_teachers_figure_has_three_images_in_a_row(distilled: Any) -> None:
    height, width, _ = picture(distilled[0], "teacher/softened").shape
    assert width / height == pytest.approx(3 * 1.7 / (2 * 3.4), rel=0.01), "four images"


def test_the_test_accuracy_is_logged_as_metric_of_the_hyper_parameters(distilled: Any) -> None:
    found, metrics, _ = distilled
    scalars = found.Scalars("hp/test_accuracy")
    assert [event.value for event in scalars] == pytest.approx([-1.0, metrics["test/accuracy"]])
    assert {event.step for event in scalars} == {0}
    assert found.Scalars("test/accuracy")[-1].value == pytest.approx(scalars[-1].value)


def test_hyper_parameters_of_module_and_data_are_logged(distilled: Any) -> None:
    content = distilled[0].PluginTagToContent("hparams")["_hparams_/session_start_info"]
    start = HParamsPluginData.FromString(content).session_start_info.hparams
    assert start["temperature"].number_value == 3.0
    assert start["alpha"].number_value == 0.5
    assert start["batch_size"].number_value == 256
    assert start["learning_rate"].number_value == pytest.approx(0.1)
    assert not any(name.startswith("_") for name in start)
    assert not any(value.string_value == "None" for value in start.values()), "the first columns would be empty"
    assert hyper_parameter_metrics(distilled[0]) == {"hp/test_accuracy"}


def test_the_metric_of_hyper_parameters_is_logged_with_default_logger_options(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    trainer = make_trainer(callbacks=[TensorBoardImages()], logger=TensorBoardLogger(tmp_path), limit_train_batches=1)
    trainer.fit(TeacherModule(small()), digits)
    assert "hp/test_accuracy" in hyper_parameter_metrics(events(trainer))


def test_scalars_are_logged(distilled: Any) -> None:
    assert {"train/loss", "val/accuracy", "test/agreement"} <= set(distilled[0].Tags()["scalars"])


def test_without_a_teacher_only_training_images_are_logged(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"limit_train_batches": 1, "num_sanity_val_steps": 0}
    trainer = make_trainer(callbacks=[TensorBoardImages()], logger=TensorBoardLogger(tmp_path), **options)
    trainer.fit(TeacherModule(small()), digits)
    assert set(events(trainer).Tags()["images"]) == {"train/images", "train/views", "val/confusion", "val/per_class"}


def test_of_a_run_without_validation_no_sanity_check_is_drawn(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(callbacks=[TensorBoardImages()], logger=logger, check_val_every_n_epoch=2)
    trainer.fit(TeacherModule(small()), digits)
    assert set(events(trainer).Tags()["images"]) == {"train/images", "train/views"}


@pytest.mark.parametrize(("views", "epochs", "columns"), [(None, 3, 3), (2, 3, 2), (None, 9, 8)])
def test_the_views_are_those_that_the_epochs_show(
    small: Networks, make_trainer: Trainers, tmp_path: Path, views: int | None, epochs: int, columns: int
) -> None:
    seen: dict[tuple[int, int], Tensor] = {}

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            samples = (batch.ids // (views or 1)).tolist()
            seen.update({(sample, trainer.current_epoch): image for sample, image in zip(samples, batch.images)})  # noqa: B905

    data = DigitsDataModule(batch_size=575, views=views)
    options: dict[str, Any] = {"max_epochs": epochs, "limit_val_batches": 0}
    trainer = make_trainer(callbacks=[TensorBoardImages(), Keep()], logger=TensorBoardLogger(tmp_path), **options)
    trainer.fit(TeacherModule(small()), data)
    shown = picture(events(trainer), "train/views")
    samples = data.train_samples[:4].tolist()
    images = torch.stack([seen[sample, epoch] for sample in samples for epoch in range(columns)])
    labels = data.splits["train"].labels[samples].tolist()
    captions = [f"{label}\nepoch {epoch}" for label in labels for epoch in range(columns)]
    expected = image_grid((images * 0.376 + 0.305).clamp(0, 1), captions, columns=columns)
    assert np.abs(shown.astype(int) - np.asarray(expected).astype(int)).max() <= 1


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_images_of_plain_loaders_are_logged(make_trainer: Trainers, tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.rand(8, 3, 6, 6), torch.arange(8) % 3), batch_size=4)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(108, 3)) for _ in range(2)]
    module = DistillationModule(*networks, teacher_check="off")
    callback = TensorBoardImages(images=4, teacher_images=4)
    trainer = make_trainer(callbacks=[callback], logger=TensorBoardLogger(tmp_path), num_sanity_val_steps=0)
    trainer.fit(module, loader, loader)
    trainer.test(module, loader, verbose=False)
    assert set(events(trainer).Tags()["images"]) == {
        *("train/images", "teacher/softened"),
        *("val/confusion", "val/per_class", "test/confusion", "test/per_class"),
    }


@pytest.mark.parametrize("csv", [False, True])
def test_nothing_is_logged_without_a_tensorboard_logger(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path, csv: bool
) -> None:
    logger = CSVLogger(tmp_path) if csv else False
    trainer = make_trainer(callbacks=[TensorBoardImages()], logger=logger, limit_train_batches=1)
    module = TeacherModule(small())
    trainer.fit(module, digits)
    trainer.test(module, digits, verbose=False)
    assert not list(tmp_path.rglob("events.out*"))
    assert "hp/test_accuracy" not in trainer.callback_metrics


def test_images_are_logged_beside_another_logger(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    logger = TensorBoardLogger(tmp_path / "tb")
    trainer = make_trainer(callbacks=[TensorBoardImages()], logger=[CSVLogger(tmp_path / "csv"), logger])
    trainer.test(TeacherModule(small()), digits, verbose=False)
    found = EventAccumulator(logger.log_dir)
    found.Reload()
    assert found.Tags()["images"] == ["test/confusion", "test/per_class"]


@pytest.mark.parametrize("concat", [False, True])
def test_of_two_domains_the_images_of_both_are_logged(tmp_path: Path, concat: bool) -> None:
    source, target = DigitsDataModule(), DigitsDataModule(mean=(0.1,), std=(0.9,))
    pair = DomainPairDataModule(source, target, concat=concat)
    trainer = pl.Trainer(accelerator="cpu", logger=TensorBoardLogger(tmp_path))
    trainer.datamodule = pair  # type: ignore[attr-defined]
    raw = next(iter(pair.train_dataloader()))[0]
    TensorBoardImages(images=12).on_train_batch_start(
        trainer, pl.LightningModule(), pair.on_after_batch_transfer(dict(raw)), 0
    )
    assert trainer.logger is not None
    trainer.logger.finalize("success")
    found = events(trainer)
    assert set(found.Tags()["images"]) == {"train/images_source", "train/images_target"}
    names = [str(label) for label in raw["source"].labels[:12].tolist()]
    assert_shows(picture(found, "train/images_source"), source.pixels(raw["source"])[:12] / 255, names)
    assert_shows(picture(found, "train/images_target"), target.pixels(raw["target"])[:12] / 255, ["unlabelled"] * 12)


def test_mixed_images_are_logged_with_both_classes(small: Networks, make_trainer: Trainers, tmp_path: Path) -> None:
    kept: list[Any] = []

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            kept.append(batch)

    data = DigitsDataModule(augmentation=Augmentation(mixup=1.0))
    callbacks = [TensorBoardImages(images=6), Keep()]
    trainer = make_trainer(callbacks=callbacks, logger=TensorBoardLogger(tmp_path), limit_train_batches=1)
    trainer.fit(TeacherModule(small()), data)
    captions = label_captions(kept[0].labels[:6], [str(number) for number in range(10)])
    assert any("\n" in caption for caption in captions)
    pixels = (kept[0].images[:6] * 0.376 + 0.305).clamp(0, 1)
    assert_shows(picture(events(trainer), "train/images"), pixels, captions)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_normalized_images_of_unknown_statistics_are_stretched_to_what_can_be_shown(
    make_trainer: Trainers, tmp_path: Path
) -> None:
    images = torch.randn(4, 3, 6, 6)
    loader = DataLoader(TensorDataset(images, torch.tensor([2, -1, 0, 1])), batch_size=4)
    trainer = make_trainer(callbacks=[TensorBoardImages()], logger=TensorBoardLogger(tmp_path), num_sanity_val_steps=0)
    trainer.fit(TeacherModule(nn.Sequential(nn.Flatten(), nn.Linear(108, 3))), loader, loader)
    pixels = (images - images.min()) / (images.max() - images.min())
    assert_shows(picture(events(trainer), "train/images"), pixels, ["2", "unlabelled", "0", "1"])


def test_the_teacher_gets_images_of_its_own_size(make_trainer: Trainers, tmp_path: Path) -> None:
    asked: list[Tensor] = []

    class Module(pl.LightningModule):
        def reference_logits(self, images: Tensor) -> Tensor:
            asked.append(images)
            return torch.zeros(len(images), 3)

    trainer = make_trainer(logger=TensorBoardLogger(tmp_path))
    trainer.datamodule = None  # type: ignore[attr-defined]
    batch = Batch(torch.rand(4, 3, 8, 8), torch.arange(4) % 3, torch.arange(4), torch.rand(4, 3, 16, 16))
    TensorBoardImages(teacher_images=2).on_train_batch_start(trainer, Module(), batch, 0)
    assert batch.teacher_images is not None
    assert torch.equal(asked[0], batch.teacher_images[:2])
