"""MNIST: files in place, normalization, views, and `scripts/lay_out_mnist.py`. Downloads: `test_download.py`."""

import gzip
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_server import Server
from reading import in_epoch, in_memory
from small_sets import SMALL_MNIST, SmallSet, idx

from kd_lightning.data import DigitsDataModule, MNISTDataModule, USPSDataModule
from kd_lightning.data.augmentation.crops import normalize

SCRIPT = Path(__file__).parents[2] / "scripts" / "lay_out_mnist.py"
EXTRACTED = {name.removesuffix(".gz"): gzip.decompress(content) for name, content in SMALL_MNIST.files.items()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the extracted files only."""
    folder = tmp_path / SMALL_MNIST.folder
    folder.mkdir(parents=True)
    for name, content in EXTRACTED.items():
        (folder / name).write_bytes(content)
    return tmp_path


def test_extracted_files_are_read_exactly_without_a_download(root: Path) -> None:
    data = MNISTDataModule(str(root))
    data.prepare_data()
    SMALL_MNIST.assert_read_exactly(data)
    assert data.image_shape == (1, 28, 28)
    assert data.classes == DigitsDataModule().classes == USPSDataModule().classes


@pytest.mark.parametrize("length", [-1, 3, 0, 10])
def test_a_truncated_extracted_file_is_replaced_from_its_archive(
    tmp_path: Path, server: Server, publish: Callable[[SmallSet], Any], length: int
) -> None:
    publish(SMALL_MNIST)
    data = MNISTDataModule(str(tmp_path))
    data.prepare_data()
    server.requested.clear()
    for name, content in EXTRACTED.items():
        (tmp_path / SMALL_MNIST.folder / name).write_bytes(content[:length])
        data.prepare_data()
        SMALL_MNIST.assert_read_exactly(data)
    assert not server.requested


def test_images_without_labels_are_refused(root: Path) -> None:
    (root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(8, dtype=np.uint8)))
    data = MNISTDataModule(str(root))
    data.load("train")
    with pytest.raises(ValueError, match=r"has 9 images and 8 labels for 'test'; remove its files to have them"):
        data.load("test")


def test_training_images_are_cropped_normalized_and_not_flipped(root: Path) -> None:
    data = MNISTDataModule(str(root), batch_size=10, val_fraction=0.5)
    stored = next(iter(data.train_dataloader()))
    padded = torch.nn.functional.pad(SMALL_MNIST.pixels[stored.ids], (2, 2, 2, 2))
    shifts = torch.stack([padded[:, :, y : y + 28, x : x + 28] for y in range(5) for x in range(5)])
    assert (shifts == data.pixels(stored)).flatten(2).all(2).any(0).all()
    expected = (data.pixels(stored).double() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(data.augment(stored).images.double(), expected, rtol=0, atol=1e-6)
    val = data.augment(next(iter(data.val_dataloader())))
    assert torch.equal(val.images, normalize(SMALL_MNIST.pixels[val.ids], mean=(0.1307,), std=(0.3081,)))
    assert not set(val.ids.tolist()) & set(stored.ids.tolist())


def test_ids_number_the_views(root: Path) -> None:
    data = MNISTDataModule(str(root), batch_size=10, views=3)
    stored = next(iter(in_epoch(data.train_dataloader(), 4)))
    assert torch.equal(data.augment(stored).ids, stored.ids * 3 + 1)


def test_images_are_resized_and_get_three_channels_when_they_are_read(root: Path) -> None:
    data = MNISTDataModule(str(root), size=32, channels=3)
    data.setup("test")
    batch = data.augment(next(iter(data.test_dataloader())))
    assert in_memory(data.splits["test"]).pixels.shape == (9, 3, 32, 32)
    assert batch.images.shape[1:] == data.image_shape == (3, 32, 32)
    assert torch.equal(batch.images[:, 0], batch.images[:, 2])
    assert (data.mean, data.std) == ((0.1307,) * 3, (0.3081,) * 3)
    with pytest.raises(ValueError, match=r"^size must be >= 1"):
        MNISTDataModule(size=0)


def run_script(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


def test_the_script_splits_digits_into_a_data_set_that_is_read(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    labels = np.arange(40, dtype=np.uint8) % 10
    (tmp_path / "images.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "labels").write_bytes(idx(labels))
    arguments = [tmp_path / "images.gz", tmp_path / "labels", "--root", tmp_path / "data", "--test", 10]
    for _ in range(2):
        done = run_script(*arguments)
        assert done.returncode == 0, done.stderr
        assert "30 images to train, by class: [3, 3, 3, 3, 3, 3, 3, 3, 3, 3]" in done.stdout
        assert "10 images to test, by class: [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]" in done.stdout
    data = MNISTDataModule(str(tmp_path / "data"))
    data.prepare_data()
    train, test = (in_memory(data.load(split)) for split in ("train", "test"))
    pixels = torch.cat([train.pixels, test.pixels]).flatten(1)
    rows = torch.cat([pixels, torch.cat([train.labels, test.labels])[:, None]], dim=1)
    expected = np.concatenate([images.reshape(40, -1), labels[:, None]], axis=1)
    assert sorted(rows.tolist()) == sorted(expected.tolist())
    refused = run_script(*arguments, "--seed", 1)
    assert refused.returncode == 1
    assert "exists with other content; remove it, or give another --root." in refused.stderr
    assert torch.equal(in_memory(data.load("test")).pixels, test.pixels)
