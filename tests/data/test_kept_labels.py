"""Few labels: which are kept, what is trained on, and what stays as it was."""

import zlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reading import in_epoch
from torch import Tensor

from kd_lightning import DigitsDataModule, ImageFolderDataModule
from kd_lightning.data import Augmentation
from kd_lightning.data.image_set import StreamedImages
from kd_lightning.data.kept_labels import keep_labels
from kd_lightning.errors import UserError


def shown(data: Any, split: str = "train") -> tuple[Tensor, Tensor]:
    """Return ids and labels of the batches of a loader."""
    batches = [data.augment(batch) for batch in getattr(data, f"{split}_dataloader")()]
    return torch.cat([batch.ids for batch in batches]), torch.cat([batch.labels for batch in batches])


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=60), st.integers(1, 3), st.integers(0, 5))
def test_kept_labels_are_those_of_the_set_and_as_many_of_each_class(values: list[int], count: int, seed: int) -> None:
    labels = torch.tensor(values)
    samples = torch.arange(0, len(labels), 2)
    there = [label for label in range(4) if (labels[samples] == label).any()]
    if any((labels[samples] == label).sum() < count for label in there):
        with pytest.raises(UserError, match="labels_per_class is"):
            keep_labels(labels, samples, per_class=count, seed=seed)
        return
    kept = keep_labels(labels, samples, per_class=count, seed=seed)
    others = torch.arange(1, len(labels), 2)
    assert torch.equal(kept[others], labels[others])
    assert [(kept[samples] == label).sum().item() for label in there] == [count] * len(there)
    assert (kept[kept >= 0] == labels[kept >= 0]).all()
    assert torch.equal(kept, keep_labels(labels, samples, per_class=count, seed=seed))


def test_the_message_names_the_class_and_what_to_do() -> None:
    with pytest.raises(UserError) as raised:
        DigitsDataModule(labels_per_class=116).setup("fit")
    assert str(raised.value) == (
        "labels_per_class is 116, but class 0 has 114 labelled training images; set it to 114 or less, or provide more "
        "images."
    )
    with pytest.raises(UserError, match="labels_per_class must be >= 1, or null for all labels, got 0"):
        DigitsDataModule(labels_per_class=0)


def test_all_images_are_trained_on_and_only_kept_labels_are_seen() -> None:
    all_labels, few = DigitsDataModule(batch_size=1), DigitsDataModule(batch_size=1, labels_per_class=10)
    (ids, true), (same_ids, labels) = shown(all_labels), shown(few)
    assert torch.equal(ids, same_ids)
    assert labels[labels >= 0].bincount().tolist() == [10] * 10
    assert torch.equal(labels[labels >= 0], true[labels >= 0])
    assert few.has_labels("train")
    assert not few.all_labelled


def test_validation_and_test_images_keep_their_labels() -> None:
    all_labels, few = (DigitsDataModule(labels_per_class=count) for count in (None, 10))
    for data in (all_labels, few):
        data.setup("fit")
        data.setup("test")
    for split in ("val", "test"):
        for one, other in zip(shown(all_labels, split), shown(few, split), strict=True):
            assert torch.equal(one, other)


def test_labelled_only_trains_on_the_images_with_a_label() -> None:
    few = DigitsDataModule(batch_size=50, labels_per_class=10, labelled_only=True)
    ids, labels = shown(few)
    assert len(ids.unique()) == 100
    assert labels.bincount().tolist() == [10] * 10
    assert few.all_labelled
    assert len(few.train_dataloader()) == 2
    assert torch.equal(ids.sort().values, few.train_samples)


def test_the_seed_chooses_other_labels_of_the_same_split() -> None:
    found = {}
    for seed in (0, 1):
        data = DigitsDataModule(seed=seed, split_seed=0, labels_per_class=10, labelled_only=True)
        found[seed] = set(data.train_samples.tolist()), shown(data, "val")[0]
    assert found[0][0] != found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_labelled_only_leaves_out_images_that_never_had_a_label(tmp_path: Path) -> None:
    data = ImageFolderDataModule(str(write_folder(tmp_path)), labelled_only=True, batch_size=2, image_size=8)
    data.setup("fit")
    assert len(data.train_samples) == 6
    every = ImageFolderDataModule(str(tmp_path), batch_size=2, image_size=8)
    every.setup("fit")
    assert len(every.train_samples) == 10


def test_labels_of_images_that_are_read_from_files_are_kept_too(tmp_path: Path) -> None:
    root = str(write_folder(tmp_path))
    options: dict[str, Any] = {"memory_limit": 0.0, "cache": "off", "image_size": 8, "batch_size": 1}
    data = ImageFolderDataModule(root, labels_per_class=2, **options)
    data.setup("fit")
    assert isinstance(data.splits["train"], StreamedImages)
    ids, labels = shown(data)
    assert labels[labels >= 0].bincount().tolist() == [2, 2]
    assert len(ids) == 10
    assert shown(data, "val")[1].tolist() == [0, 1]


def write_folder(root: Path) -> Path:
    """Write three training images and one for validation of each of two classes, and four without a class."""
    for place, count in {"train/ant": 3, "train/bee": 3, "val/ant": 1, "val/bee": 1, "unlabelled": 4}.items():
        folder = root / place
        folder.mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (10, 10), (20 * number, zlib.crc32(place.encode()) % 256, 9)).save(
                folder / f"{number}.png"
            )
    return root


def test_hidden_labels_are_not_mixed_in() -> None:
    data = DigitsDataModule(labels_per_class=1, augmentation=Augmentation(mixup=1.0), batch_size=64)
    data.setup("fit")
    kept = data.splits["train"].labels >= 0
    kept[data.splits.val_samples] = False
    for batch in in_epoch(data.train_dataloader(), 3):
        labels = data.augment(batch).labels
        assert torch.equal((labels < 0).all(1), ~kept[batch.ids])


def test_a_teachers_stored_outputs_serve_runs_with_other_labels_but_not_with_other_images() -> None:
    given: list[dict[str, Any]] = [{}, {"labels_per_class": 10}, {"labels_per_class": 10, "labelled_only": True}]
    fingerprints = [DigitsDataModule(views=2, **options).fingerprint() for options in given]
    assert fingerprints[0] == fingerprints[1]
    assert fingerprints[1]["images"] != fingerprints[2]["images"]


def test_no_label_at_all_is_refused() -> None:
    data = DigitsDataModule(labelled_only=True)
    data.setup("fit")
    data.splits["train"].labels.fill_(-1)
    with pytest.raises(UserError, match="labelled_only leaves no training image, since none is labelled"):
        data.train_dataloader()


def test_the_options_are_in_checkpoints(tmp_path: Path, make_trainer: Any, small: Any) -> None:
    from kd_lightning import TeacherModule

    data = DigitsDataModule(labels_per_class=3, labelled_only=True)
    trainer: pl.Trainer = make_trainer()
    trainer.fit(TeacherModule(small()), data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert (saved["labels_per_class"], saved["labelled_only"]) == (3, True)
    assert trainer.global_step == 1  # 30 images in one batch
