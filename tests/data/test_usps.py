"""USPS in its published format, from a local server."""

import bz2
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from local_server import Server
from reading import in_memory
from torchvision.datasets import USPS

from kd_lightning.data import Augmentation, USPSDataModule

IMAGES = np.random.default_rng(0).integers(0, 256, (29, 256), dtype=np.uint8)
LABELS = [i % 10 for i in range(29)]  # 20 training images, 9 test images
ROWS = {"train": slice(0, 20), "test": slice(20, 29), "predict": slice(20, 29)}


def written(rows: slice) -> bytes:
    lines = []
    for pixels, label in zip(IMAGES[rows], LABELS[rows], strict=True):
        # a thousandth above, since torchvision rounds down
        values = " ".join(f"{i + 1}:{(pixel + 0.001) / 255 * 2 - 1:.7f}" for i, pixel in enumerate(pixels.tolist()))
        lines.append(f"{label + 1} {values} \n")
    return bz2.compress("".join(lines).encode())


@pytest.fixture
def usps(server: Server, monkeypatch: pytest.MonkeyPatch) -> type[USPS]:
    """A small USPS with its own checksums, which the data module takes for the real one."""
    server.contents = {"usps.bz2": written(ROWS["train"]), "usps.t.bz2": written(ROWS["test"])}

    class Small(USPS):
        split_list = {  # noqa: RUF012
            split: [server.url + name, name, hashlib.md5(server.contents[name], usedforsecurity=False).hexdigest()]
            for split, name in (("train", "usps.bz2"), ("test", "usps.t.bz2"))
        }

    monkeypatch.setattr(USPSDataModule, "dataset", Small)
    return Small


def assert_is_the_written_one(data: USPSDataModule) -> None:
    for split, rows in ROWS.items():
        images = in_memory(data.load(split))
        assert torch.equal(images.pixels, torch.from_numpy(IMAGES[rows].reshape(-1, 1, 16, 16)))
        assert (images.labels.tolist(), images.labels.dtype) == (LABELS[rows], torch.int64)
    assert data.load("val") is None


def test_it_is_downloaded_once_and_read_to_the_bit(tmp_path: Path, server: Server, usps: type[USPS]) -> None:
    data = USPSDataModule(str(tmp_path / "new"))
    data.prepare_data()
    asked = server.requests
    data.prepare_data()
    assert server.requests == asked > 0
    assert_is_the_written_one(data)


@pytest.mark.parametrize("name", ["usps.bz2", "usps.t.bz2"])
def test_a_damaged_file_is_downloaded_again(tmp_path: Path, server: Server, usps: type[USPS], name: str) -> None:
    data = USPSDataModule(str(tmp_path))
    server.manner = "half"
    with pytest.raises(ConnectionError, match=r"usps\.bz2 is damaged or was interrupted \(.*\); run again, or put the"):
        data.prepare_data()
    server.manner = "whole"
    data.prepare_data()
    (tmp_path / name).write_bytes(server.contents[name][:-1])
    data.prepare_data()
    assert_is_the_written_one(data)


def test_without_a_network_the_message_says_where_a_file_goes(tmp_path: Path, server: Server, usps: type[USPS]) -> None:
    usps.split_list["test"][0] = "http://127.0.0.1:1/usps.t.bz2"
    data, place = USPSDataModule(str(tmp_path)), tmp_path / "usps.t.bz2"
    with pytest.raises(ConnectionError) as caught:
        data.prepare_data()
    message = str(caught.value)
    assert message.startswith("http://127.0.0.1:1/usps.t.bz2 cannot be downloaded (")
    assert message.endswith(f"; get it by other means and put the file at {str(place)!r}.")
    place.write_bytes(server.contents["usps.t.bz2"])
    data.prepare_data()
    assert_is_the_written_one(data)


def test_views_are_normalised_resized_and_not_mirrored(tmp_path: Path, usps: type[USPS]) -> None:
    data = USPSDataModule(str(tmp_path), batch_size=10, augmentation=Augmentation(padding=0), val_fraction=0.5)
    data.prepare_data()
    stored = next(iter(data.train_dataloader()))
    expected = (in_memory(data.splits["train"]).pixels[stored.ids].double() / 255 - 0.2469) / 0.2989
    torch.testing.assert_close(data.augment(stored).images.double(), expected, rtol=0, atol=1e-6)
    assert data.image_shape == (1, 16, 16)
    data = USPSDataModule(str(tmp_path), size=28, channels=3)
    images = data.augment(next(iter(data.test_dataloader()))).images
    assert images.shape[1:] == data.image_shape == (3, 28, 28)
    assert in_memory(data.splits["test"]).pixels.shape == (9, 3, 28, 28)


def test_the_real_dataset_is_torchvisions() -> None:
    assert USPSDataModule.dataset is USPS
    assert USPSDataModule(augmentation=Augmentation(padding=0)).classes == tuple("0123456789")
