"""CIFAR: what torchvision checks before it reads, and the classes and statistics. Downloads: `test_download.py`."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_server import Server
from PIL import Image
from small_sets import SMALL_CIFAR10, SmallSet, archived, flipped

from kd_lightning.data import CIFAR10DataModule, CIFAR100DataModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning"),  # tarfile, of torchvision's extraction
    pytest.mark.filterwarnings("ignore:dtype.* align should be passed"),  # NumPy 2.4.0, of the published pickles
]


@pytest.fixture
def cifar10(publish: Callable[[SmallSet], Any]) -> Any:
    return publish(SMALL_CIFAR10)


def assert_download_refused(data: CIFAR10DataModule) -> None:
    with pytest.raises(ConnectionError, match="damaged or was interrupted"):
        data.prepare_data()
    with pytest.raises(RuntimeError, match="corrupted"):
        data.load("train")


def test_training_uses_the_images_that_validation_leaves_and_reads_no_test_image(
    tmp_path: Path, cifar10: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = CIFAR10DataModule(str(tmp_path), batch_size=10, val_fraction=0.5)
    data.prepare_data()
    splits = []
    construct = cifar10.__init__

    def record_split(self: Any, root: str, train: bool = True, **options: Any) -> None:
        splits.append(train)
        construct(self, root, train, **options)

    monkeypatch.setattr(cifar10, "__init__", record_split)
    data.setup("fit")
    train, val = (
        [data.augment(batch) for batch in loader] for loader in (data.train_dataloader(), data.val_dataloader())
    )
    assert splits == [True]
    assert [batch.images.shape for batch in train] == [(10, 3, 32, 32)]
    assert val[0].labels.bincount().tolist() == [1] * 10
    mean, std = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]]).double()[:, :, None, None]
    expected = (SMALL_CIFAR10.pixels[val[0].ids].double() / 255 - mean) / std
    torch.testing.assert_close(val[0].images.double(), expected, rtol=0, atol=1e-6)
    data.setup("test")
    assert splits == [True, False]


def test_an_archive_of_other_files_is_refused(tmp_path: Path, cifar10: Any) -> None:
    cifar10.test_list = [["test_batch", "0" * 32]]
    assert_download_refused(CIFAR10DataModule(str(tmp_path)))


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
def test_a_damaged_extracted_file_is_replaced_from_the_archive(
    tmp_path: Path, server: Server, cifar10: Any, name: str
) -> None:
    data = CIFAR10DataModule(str(tmp_path))
    data.prepare_data()
    server.requested.clear()
    for damage in (flip_a_bit, Path.unlink):
        damage(tmp_path / "cifar-10-batches-py" / name)
        with pytest.raises(RuntimeError, match="corrupted"):
            data.load("train")
        data.prepare_data()
        SMALL_CIFAR10.assert_read_exactly(data)
    assert not server.requested


class Payload:
    """An object whose unpickling creates a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_5", "test_batch", "batches.meta"])
def test_a_pickle_with_another_checksum_is_not_opened(
    tmp_path: Path, cifar10: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = CIFAR10DataModule("data")
    data.prepare_data()
    malicious = pickle.dumps(Payload())
    pickle.loads(malicious)
    Path("ran").rmdir()  # which shows that the payload works
    Path("data/cifar-10-batches-py", name).write_bytes(malicious)
    for split in ("train", "test", "predict"):
        with pytest.raises(RuntimeError, match="corrupted"):
            data.load(split)
    assert not Path("ran").exists()
    cifar10.tgz_md5 = "0" * 32  # so that the archive does not replace it
    assert_download_refused(data)
    assert not Path("ran").exists()


def test_an_archive_with_another_checksum_is_not_opened(tmp_path: Path, server: Server, cifar10: Any) -> None:
    server.files[cifar10.filename] = archived("..", {"outside": b"", "data_batch_1": pickle.dumps(Payload())})
    assert_download_refused(CIFAR10DataModule(str(tmp_path / "data")))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == [cifar10.filename]


def test_damaged_class_names_are_refused(tmp_path: Path, cifar10: Any) -> None:
    data = CIFAR10DataModule(str(tmp_path))
    data.prepare_data()
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(b"")
    assert_download_refused(data)


def test_classes_are_in_the_order_of_the_published_metadata(tmp_path: Path, cifar10: Any) -> None:
    data = CIFAR10DataModule(str(tmp_path))
    data.prepare_data()
    assert list(data.classes) == cifar10(str(tmp_path)).classes


def test_classes_are_known_without_the_files() -> None:
    assert CIFAR10DataModule().classes[::9] == ("airplane", "truck")
    fine = CIFAR100DataModule().classes
    assert len(set(fine)) == len(fine) == CIFAR100DataModule().num_classes == 100
    assert list(fine) == sorted(fine)
    assert [fine[i] for i in (0, 8, 41, 57, 90, 99)] == ["apple", "bicycle", "lawn_mower", "pear", "train", "worm"]


def flip_a_bit(path: Path) -> None:
    path.write_bytes(flipped(path.read_bytes()))


def test_with_one_mean_colours_become_grey_by_luma(tmp_path: Path, cifar10: Any) -> None:
    data = CIFAR10DataModule(str(tmp_path), mean=[0.0], std=[1.0])
    data.prepare_data()
    data.setup("test")
    (batch,) = [data.augment(batch) for batch in data.test_dataloader()]
    assert data.image_shape == (1, 32, 32)
    pixels = SMALL_CIFAR10.pixels[20:].permute(0, 2, 3, 1).numpy()
    grey = np.stack([np.array(Image.fromarray(image).convert("L")) for image in pixels])
    assert torch.allclose(batch.images * 255, torch.from_numpy(grey)[:, None].float(), atol=1e-3)


def test_channels_that_the_images_do_not_have_are_refused(tmp_path: Path, cifar10: Any) -> None:
    data = CIFAR10DataModule(str(tmp_path), mean=[0.5, 0.5], std=[1.0, 1.0])
    data.prepare_data()
    with pytest.raises(ValueError, match=r"^Images of 3 channels cannot be turned into 2, only colour \(3\) into grey"):
        data.setup("fit")
