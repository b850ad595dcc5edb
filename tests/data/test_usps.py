"""USPS: normalization, size and channels. Downloads: `test_download.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reading import in_memory
from small_sets import SMALL_USPS, SmallSet

from kd_lightning.data import Augmentation, USPSDataModule


@pytest.fixture
def root(publish: Callable[[SmallSet], Any], tmp_path: Path) -> Path:
    """A folder with the files."""
    publish(SMALL_USPS)
    USPSDataModule(str(tmp_path)).prepare_data()
    return tmp_path


def test_images_are_normalized_and_not_flipped(root: Path) -> None:
    data = USPSDataModule(str(root), batch_size=10, augmentation=Augmentation(padding=0), val_fraction=0.5)
    stored = next(iter(data.train_dataloader()))
    expected = (SMALL_USPS.pixels[stored.ids].double() / 255 - 0.2469) / 0.2989
    torch.testing.assert_close(data.augment(stored).images.double(), expected, rtol=0, atol=1e-6)
    assert data.image_shape == (1, 16, 16)


def test_images_are_resized_and_get_three_channels_when_they_are_read(root: Path) -> None:
    data = USPSDataModule(str(root), size=28, channels=3)
    images = data.augment(next(iter(data.test_dataloader()))).images
    assert images.shape[1:] == data.image_shape == (3, 28, 28)
    assert in_memory(data.splits["test"]).pixels.shape == (9, 3, 28, 28)


def test_classes_are_the_digits() -> None:
    assert USPSDataModule().classes == tuple("0123456789")
