"""Weights of the classes, and sampling that shows them equally often."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from on_other_device import OTHER_DEVICE, call, on_other_device
from recipe_runs import fit_arguments
from resume_check import check_resume
from sklearn.utils.class_weight import compute_class_weight
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.losses import DistillationLoss, HardTargetLoss, SoftTargetLoss
from kd_lightning.modules.class_weights import build_class_weights
from kd_lightning.networks import ResNet

Trainers = Callable[..., pl.Trainer]
Small = Callable[..., ResNet]


class RareDigits(DigitsDataModule):
    """The digits, with few of the first classes."""

    def load(self, split: str) -> Any:
        images = super().load(split)
        if images is None or split != "train":
            return images
        rows = [row for row, label in enumerate(images.labels.tolist()) if label > 3 or row % 8 == 0]
        return type(images)(images.labels[rows], images.pixels[rows])


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    data = RareDigits()
    data.setup("fit")
    labels = data.splits["train"].labels[data.train_samples].numpy()
    expected = compute_class_weight("balanced", classes=np.arange(10), y=labels)
    found = build_class_weights("balanced", data, 10)
    assert found is not None
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("kind", ["teacher", "distillation"])
def test_the_weights_are_in_the_loss(kind: str, small: Small, make_trainer: Trainers) -> None:
    """With a weight on one class alone, only its rows are learned from."""
    weights = [0.0] * 9 + [1.0]
    torch.manual_seed(0)
    network = small(width=8)
    options: dict[str, Any] = {"class_weights": weights, "learning_rate": 0.3}
    module: pl.LightningModule = TeacherModule(network, **options)
    if kind == "distillation":
        module = DistillationModule(network, losses={"hard": HardTargetLoss()}, **options)
    make_trainer(max_epochs=3).fit(module, RareDigits(batch_size=64))
    data = RareDigits(batch_size=64)
    data.setup("fit")
    batch = data.augment(next(iter(data.val_dataloader())))
    assert (module.eval()(batch.images).argmax(1) == 9).float().mean() > 0.9


@on_other_device
def test_weights_lie_on_the_device_of_the_logits(tmp_path: Path) -> None:
    both = ["--model.class_weights=balanced", "--data.balanced_sampling=true"]
    for recipe in ("digits/teacher", "digits/distill"):
        assert "The best checkpoint is" in call(tmp_path, *fit_arguments(recipe, tmp_path), *OTHER_DEVICE, *both)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], r"^class_weights has 2 numbers for 10 classes; give one for each\.$"),
        ([-1.0] * 10, r"^class_weights must be 'balanced' or a number >= 0 for each class, got \[-1\.0"),
        ("other", r"^class_weights must be 'balanced' or a number >= 0 for each class, got 'other'; correct them\.$"),
        ([0.0] * 10, r"^class_weights must be 'balanced' or a number >= 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: Any, message: str, small: Small, make_trainer: Trainers) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer().fit(TeacherModule(small(), class_weights=weights), DigitsDataModule(batch_size=256))


def test_weights_that_nothing_uses_are_refused(small: Small, make_trainer: Trainers) -> None:
    losses: dict[str, DistillationLoss] = {"soft": SoftTargetLoss()}
    module = DistillationModule(small(), small(), losses=losses, teacher_check="off", class_weights="balanced")
    with pytest.raises(ValueError, match=r"^class_weights weigh the rows of HardTargetLoss, and no loss is one; add"):
        make_trainer().fit(module, DigitsDataModule(batch_size=256))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_balanced_weights_need_the_labels_of_all_images(small: Small, make_trainer: Trainers) -> None:
    images = TensorDataset(torch.rand(4, 1, 8, 8), torch.arange(4))
    batches = DataLoader(images, batch_size=4)
    with pytest.raises(ValueError, match=r"^class_weights='balanced' needs the labels of all training images, which"):
        make_trainer().fit(TeacherModule(small(), class_weights="balanced"), batches, batches)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("options", [{"balanced_sampling": True}, {"balanced_sampling": True, "num_workers": 1}])
def test_a_run_with_both_resumes_to_the_same_weights(
    options: dict[str, Any], small: Small, make_trainer: Trainers, tmp_path: Path
) -> None:
    def trainer(**more: Any) -> pl.Trainer:
        return make_trainer(max_epochs=3, limit_train_batches=3, **more)

    data = lambda: RareDigits(batch_size=32, **options)  # noqa: E731
    check_resume(
        trainer,
        tmp_path,
        data,
        TeacherModule,
        network=small,
        class_weights=lambda: "balanced",
        learning_rate=lambda: 0.1,
    )


def test_images_without_labels_cannot_be_balanced() -> None:
    data = DigitsDataModule(balanced_sampling=True)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"^data\.balanced_sampling needs labels, and those of these images are"):
        data.unlabelled_dataloader(batch_size=4, steps=2)


def test_an_epoch_shows_the_classes_equally_often() -> None:
    data = RareDigits(batch_size=16, balanced_sampling=True)
    data.setup("fit")
    loader = data.train_dataloader()
    labels = torch.cat([batch.labels for batch in loader])
    counts = torch.bincount(labels, minlength=10)
    assert len(labels) == len(data.train_samples) // 16 * 16
    assert counts.max() - counts.min() <= 16  # the batch that is left out
    assert torch.bincount(data.splits["train"].labels[data.train_samples]).min() < counts.min() / 2
