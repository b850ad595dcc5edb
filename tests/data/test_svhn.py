"""SVHN in its published format, from a local server."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from local_server import Server
from reading import in_memory
from torchvision.datasets import SVHN

from kd_lightning.data import Augmentation, SVHNDataModule

IMAGES = np.random.default_rng(0).integers(0, 256, (29, 3, 32, 32), dtype=np.uint8)
LABELS = [i % 10 for i in range(29)]  # 20 training images, 9 test images
ROWS = {"train": slice(0, 20), "test": slice(20, 29), "predict": slice(20, 29)}


def written(rows: slice) -> bytes:
    file = io.BytesIO()
    labels = np.array([[label or 10] for label in LABELS[rows]], dtype=np.uint8)  # a 0 is written as 10
    scipy.io.savemat(file, {"X": IMAGES[rows].transpose(2, 3, 1, 0), "y": labels})
    return file.getvalue()


@pytest.fixture
def svhn(server: Server, monkeypatch: pytest.MonkeyPatch) -> type[SVHN]:
    """A small SVHN with its own checksums, which the data module takes for the real one."""
    server.contents = {f"{split}_32x32.mat": written(ROWS[split]) for split in ("train", "test")}

    class Small(SVHN):
        split_list = {  # noqa: RUF012
            name.partition("_")[0]: [server.url + name, name, hashlib.md5(content, usedforsecurity=False).hexdigest()]
            for name, content in server.contents.items()
        }

    monkeypatch.setattr(SVHNDataModule, "dataset", Small)
    return Small


def assert_is_the_written_one(data: SVHNDataModule) -> None:
    for split, rows in ROWS.items():
        images = in_memory(data.load(split))
        assert torch.equal(images.pixels, torch.from_numpy(IMAGES[rows]))
        assert images.pixels.is_contiguous()
        assert (images.labels.tolist(), images.labels.dtype) == (LABELS[rows], torch.int64)
    assert data.load("val") is None


def test_it_is_downloaded_once_and_read_to_the_bit(tmp_path: Path, server: Server, svhn: type[SVHN]) -> None:
    data = SVHNDataModule(str(tmp_path / "new"))
    data.prepare_data()
    asked = server.requests
    data.prepare_data()
    assert server.requests == asked > 0
    assert_is_the_written_one(data)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_damaged_file_is_refused_and_downloaded_again(
    tmp_path: Path, server: Server, svhn: type[SVHN], split: str
) -> None:
    data, name = SVHNDataModule(str(tmp_path)), f"{split}_32x32.mat"
    server.manner = "chunked"
    with pytest.raises(ConnectionError, match=r"is damaged or was interrupted \(.*\); run again, or put the file at "):
        data.prepare_data()
    server.manner = "whole"
    data.prepare_data()
    content = bytearray(server.contents[name])
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RuntimeError, match="corrupted"):
        data.load(split)
    data.prepare_data()
    assert_is_the_written_one(data)


def test_without_a_network_the_message_says_where_a_file_goes(tmp_path: Path, svhn: type[SVHN]) -> None:
    svhn.split_list["train"][0] = "http://127.0.0.1:1/train_32x32.mat"
    with pytest.raises(ConnectionError) as caught:
        SVHNDataModule(str(tmp_path)).prepare_data()
    place = str(tmp_path / "train_32x32.mat")
    assert str(caught.value).startswith("http://127.0.0.1:1/train_32x32.mat cannot be downloaded (")
    assert str(caught.value).endswith(f"; get it by other means and put the file at {place!r}.")


def test_views_are_normalised_resized_and_not_mirrored(tmp_path: Path, svhn: type[SVHN]) -> None:
    data = SVHNDataModule(str(tmp_path), batch_size=10, augmentation=Augmentation(padding=0), val_fraction=0.5)
    data.prepare_data()
    stored = next(iter(data.train_dataloader()))
    mean, std = torch.tensor([[0.4377, 0.4438, 0.4728], [0.1980, 0.2010, 0.1970]]).double()[:, :, None, None]
    expected = (in_memory(data.splits["train"]).pixels[stored.ids].double() / 255 - mean) / std
    torch.testing.assert_close(data.augment(stored).images.double(), expected, rtol=0, atol=1e-6)
    assert data.image_shape == (3, 32, 32)
    data = SVHNDataModule(str(tmp_path), size=28, channels=1)
    images = data.augment(next(iter(data.test_dataloader()))).images
    assert images.shape[1:] == data.image_shape == (1, 28, 28)
    assert in_memory(data.splits["test"]).pixels.shape == (9, 1, 28, 28)
    assert data.mean == pytest.approx((0.4453,), abs=1e-4)


def test_the_real_dataset_is_torchvisions() -> None:
    assert SVHNDataModule.dataset is SVHN
    assert SVHNDataModule().classes == tuple("0123456789")
