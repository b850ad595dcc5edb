"""SVHN: normalization, size and channels. Downloads: `test_download.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reading import in_memory
from small_sets import SMALL_SVHN, SmallSet, flipped

from kd_lightning.data import Augmentation, SVHNDataModule


@pytest.fixture
def root(publish: Callable[[SmallSet], Any], tmp_path: Path) -> Path:
    """A folder with the files."""
    publish(SMALL_SVHN)
    SVHNDataModule(str(tmp_path)).prepare_data()
    return tmp_path


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_damaged_file_is_not_read(root: Path, split: str) -> None:
    file = root / f"{split}_32x32.mat"
    file.write_bytes(flipped(file.read_bytes()))
    with pytest.raises(RuntimeError, match="corrupted"):
        SVHNDataModule(str(root)).load(split)


def test_images_are_normalized_and_not_flipped(root: Path) -> None:
    data = SVHNDataModule(str(root), batch_size=10, augmentation=Augmentation(padding=0), val_fraction=0.5)
    stored = next(iter(data.train_dataloader()))
    mean, std = torch.tensor([[0.4377, 0.4438, 0.4728], [0.1980, 0.2010, 0.1970]]).double()[:, :, None, None]
    expected = (SMALL_SVHN.pixels[stored.ids].double() / 255 - mean) / std
    torch.testing.assert_close(data.augment(stored).images.double(), expected, rtol=0, atol=1e-6)
    assert data.image_shape == (3, 32, 32)


def test_images_are_resized_and_made_grey_when_they_are_read(root: Path) -> None:
    data = SVHNDataModule(str(root), size=28, channels=1)
    images = data.augment(next(iter(data.test_dataloader()))).images
    assert images.shape[1:] == data.image_shape == (1, 28, 28)
    assert in_memory(data.splits["test"]).pixels.shape == (9, 1, 28, 28)
    assert data.mean == pytest.approx((0.4453,), abs=1e-4)


def test_classes_are_the_digits() -> None:
    assert SVHNDataModule().classes == tuple("0123456789")
