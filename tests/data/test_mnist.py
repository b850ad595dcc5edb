"""MNIST in its published format, from a local server and from a script's hand."""

import gzip
import hashlib
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_server import Server
from reading import in_epoch, in_memory
from torchvision.datasets import MNIST

from kd_lightning.data import DigitsDataModule, MNISTDataModule, USPSDataModule
from kd_lightning.data.augmentation.crops import normalize

SCRIPT = Path(__file__).parents[2] / "scripts" / "lay_out_mnist.py"
RANDOM = np.random.default_rng(0)
IMAGES = {
    "train": RANDOM.integers(0, 256, (40, 28, 28), np.uint8),
    "t10k": RANDOM.integers(0, 256, (9, 28, 28), np.uint8),
}
LABELS = {"train": np.arange(40, dtype=np.uint8) % 10, "t10k": np.arange(9, dtype=np.uint8)}


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def files() -> dict[str, bytes]:
    images = {f"{split}-images-idx3-ubyte": idx(array) for split, array in IMAGES.items()}
    return images | {f"{split}-labels-idx1-ubyte": idx(array) for split, array in LABELS.items()}


@pytest.fixture
def laid_out(tmp_path: Path) -> Path:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, content in files().items():
        (folder / name).write_bytes(content)
    return tmp_path


@pytest.fixture
def mnist(server: Server, monkeypatch: pytest.MonkeyPatch) -> type[MNIST]:
    """A small MNIST with its own checksums, which the data module takes for the real one."""
    server.contents = {f"{name}.gz": gzip.compress(content) for name, content in files().items()}

    class Small(MNIST):
        mirrors = [server.url]  # noqa: RUF012
        resources = [  # noqa: RUF012
            (name, hashlib.md5(content, usedforsecurity=False).hexdigest()) for name, content in server.contents.items()
        ]

    monkeypatch.setattr(MNISTDataModule, "dataset", Small)
    return Small


def assert_is_the_written_one(data: MNISTDataModule) -> None:
    for split, name in (("train", "train"), ("test", "t10k"), ("predict", "t10k")):
        images = in_memory(data.load(split))
        assert torch.equal(images.pixels, torch.from_numpy(IMAGES[name])[:, None])
        assert torch.equal(images.labels, torch.from_numpy(LABELS[name]).long())
    assert data.load("val") is None


def test_files_that_are_there_are_read_to_the_bit_without_a_download(laid_out: Path) -> None:
    data = MNISTDataModule(str(laid_out))
    data.prepare_data()
    assert_is_the_written_one(data)
    assert data.image_shape == (1, 28, 28)
    assert data.classes == DigitsDataModule().classes == USPSDataModule().classes


def test_views_are_cropped_normalised_and_not_mirrored(laid_out: Path) -> None:
    data = MNISTDataModule(str(laid_out), batch_size=20, val_fraction=0.5)
    stored = next(iter(data.train_dataloader()))
    plain = in_memory(data.splits["train"]).pixels[stored.ids]
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2))
    shifts = torch.stack([padded[:, :, y : y + 28, x : x + 28] for y in range(5) for x in range(5)])
    assert (shifts == data.pixels(stored)).flatten(2).all(2).any(0).all()
    expected = (data.pixels(stored).double() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(data.augment(stored).images.double(), expected, rtol=0, atol=1e-6)
    val = data.augment(next(iter(data.val_dataloader())))
    pixels = in_memory(data.splits["train"]).pixels[val.ids]
    assert torch.equal(val.images, normalize(pixels, mean=(0.1307,), std=(0.3081,)))
    assert not set(val.ids.tolist()) & set(stored.ids.tolist())


def test_ids_number_views(laid_out: Path) -> None:
    data = MNISTDataModule(str(laid_out), views=3)
    stored = next(iter(in_epoch(data.train_dataloader(), 4)))
    assert torch.equal(data.augment(stored).ids, stored.ids * 3 + 1)


def test_images_are_resized_and_coloured_when_they_are_read(laid_out: Path) -> None:
    data = MNISTDataModule(str(laid_out), size=32, channels=3)
    data.setup("test")
    batch = data.augment(next(iter(data.test_dataloader())))
    assert in_memory(data.splits["test"]).pixels.shape == (9, 3, 32, 32)
    assert batch.images.shape[1:] == data.image_shape == (3, 32, 32)
    assert torch.equal(batch.images[:, 0], batch.images[:, 2])
    assert (data.mean, data.std) == ((0.1307,) * 3, (0.3081,) * 3)
    with pytest.raises(ValueError, match=r"^size must be >= 1"):
        MNISTDataModule(size=0)


def test_it_is_downloaded_once(tmp_path: Path, server: Server, mnist: type[MNIST]) -> None:
    data = MNISTDataModule(str(tmp_path / "new"))
    data.prepare_data()
    asked = server.requests
    data.prepare_data()
    assert server.requests == asked > 0
    assert_is_the_written_one(data)


@pytest.mark.parametrize("length", [-1, 3, 0, 10])
def test_a_damaged_file_is_replaced_from_its_archive(
    tmp_path: Path, server: Server, mnist: type[MNIST], length: int
) -> None:
    data = MNISTDataModule(str(tmp_path))
    data.prepare_data()
    asked = server.requests
    for name, content in files().items():
        (tmp_path / "Small" / "raw" / name).write_bytes(content[:length])
        data.prepare_data()
        assert_is_the_written_one(data)
    assert server.requests == asked


def test_an_interrupted_download_is_said_and_done_again(tmp_path: Path, server: Server, mnist: type[MNIST]) -> None:
    data = MNISTDataModule(str(tmp_path))
    for manner in ("half", "chunked"):
        server.manner = manner
        check_refused(data)
    mnist.mirrors = ["http://127.0.0.1:1/"]
    check_refused(data)
    mnist.mirrors = [server.url]
    server.manner = "whole"
    data.prepare_data()
    assert_is_the_written_one(data)


def check_refused(data: MNISTDataModule) -> None:
    """In one sentence that says what to do."""
    with pytest.raises(ConnectionError, match="cannot be downloaded") as caught:
        data.prepare_data()
    message = str(caught.value)
    assert repr(str(Path(data.root, "Small", "raw"))) in message
    assert message.endswith("t10k-labels-idx1-ubyte.gz there.")
    assert "\n" not in message


def test_images_without_labels_are_refused(laid_out: Path) -> None:
    (laid_out / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS["t10k"][:8]))
    data = MNISTDataModule(str(laid_out))
    data.load("train")
    with pytest.raises(ValueError, match=r"has 9 images and 8 labels for 'test'; remove its files to have them"):
        data.load("test")


def test_the_real_dataset_is_torchvisions() -> None:
    assert MNISTDataModule.dataset is MNIST


def run_script(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


def test_the_script_lays_digits_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "images.gz").write_bytes(gzip.compress(idx(IMAGES["train"])))
    (source / "labels").write_bytes(idx(LABELS["train"]))
    arguments = [source / "images.gz", source / "labels", "--root", tmp_path / "data", "--test", 10]
    for _ in range(2):
        done = run_script(*arguments)
        assert done.returncode == 0, done.stderr
        assert "30 images to train, by class: [3, 3, 3, 3, 3, 3, 3, 3, 3, 3]" in done.stdout
        assert "10 images to test, by class: [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]" in done.stdout
    data = MNISTDataModule(str(tmp_path / "data"))
    data.prepare_data()
    splits = [in_memory(data.load(split)) for split in ("train", "test")]
    rows = [
        (*image.flatten().tolist(), label)
        for split in splits
        for image, label in zip(split.pixels, split.labels.tolist(), strict=True)
    ]
    expected = [
        (*image.flatten().tolist(), label)
        for image, label in zip(IMAGES["train"], LABELS["train"].tolist(), strict=True)
    ]
    assert sorted(rows) == sorted(expected)
    refused = run_script(*arguments, "--seed", 1)
    assert refused.returncode == 1
    assert "exists with other content; remove it, or give another --root." in refused.stderr
    assert torch.equal(in_memory(data.load("test")).pixels, splits[1].pixels)
