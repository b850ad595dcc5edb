"""CIFAR end to end from a local server: the published format, its checksums, and all that goes wrong on the way."""

import hashlib
import io
import os
import pickle
import socket
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import HTTPError

import numpy as np
import pytest
import torch
from local_server import Server
from reading import in_memory
from torchvision.datasets import CIFAR10, CIFAR100

from kd_lightning.data import CIFAR10DataModule, CIFAR100DataModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning"),  # tarfile, of torchvision's extraction
    pytest.mark.filterwarnings("ignore:dtype.* align should be passed"),  # NumPy 2.4.0, of the published pickles
]

PIXELS = np.random.default_rng(0).integers(0, 256, (26, 3072), dtype=np.uint8)
LABELS = [i % 10 for i in range(26)]  # 20 training images, 6 test images


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 did, in whose days the files were published."""

    dispatch: ClassVar[dict[type, Callable[..., None]]] = pickle._Pickler.dispatch.copy()
    write: Callable[[bytes], Any]  # which pickle._Pickler sets

    def save_string(self, value: str | bytes) -> None:
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)

    dispatch[str] = dispatch[bytes] = save_string


def pickled(content: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    spellings = {b"numpy._core": b"numpy.core", b"u1\x89\x88\x87": b"u1K\x00K\x01\x87"}
    written = file.getvalue()
    for ours, published in spellings.items():
        written = written.replace(ours, published)
    return written


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def archived(folder: str, files: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


@pytest.fixture
def cifar10(server: Server, monkeypatch: pytest.MonkeyPatch) -> type[CIFAR10]:
    """A small CIFAR-10 with its own checksums, which the data module takes for the real one."""

    def batch(name: str, rows: slice) -> bytes:
        names = [f"{i}.png" for i in range(26)][rows]
        return pickled(
            {"batch_label": name, "labels": LABELS[rows], "data": PIXELS[rows], "filenames": names},
        )

    files = {f"data_batch_{i + 1}": batch(f"training batch {i + 1} of 5", slice(4 * i, 4 * i + 4)) for i in range(5)}
    files["test_batch"] = batch("testing batch 1 of 1", slice(20, 26))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    files["batches.meta"] = pickled({"num_cases_per_batch": 4, "label_names": names, "num_vis": 3072})
    server.content = archived("cifar-10-batches-py", files)

    class Small(CIFAR10):
        url = f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
        tgz_md5 = md5(server.content)
        train_list = [[f"data_batch_{i}", md5(files[f"data_batch_{i}"])] for i in range(1, 6)]  # noqa: RUF012
        test_list = [["test_batch", md5(files["test_batch"])]]  # noqa: RUF012
        meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(files["batches.meta"])}  # noqa: RUF012

    monkeypatch.setattr(CIFAR10DataModule, "dataset", Small)
    return Small


def assert_is_the_published_one(data: CIFAR10DataModule) -> None:
    for split, rows in (("train", slice(0, 20)), ("test", slice(20, 26)), ("predict", slice(20, 26))):
        images = in_memory(data.load(split))
        assert images.pixels.dtype == torch.uint8
        assert torch.equal(images.pixels, torch.from_numpy(PIXELS[rows].reshape(-1, 3, 32, 32)))
        assert images.pixels.is_contiguous()
        assert (images.labels.tolist(), images.labels.dtype) == (LABELS[rows], torch.int64)
    assert data.load("val") is None


def test_it_is_downloaded_once_and_read_to_the_bit(tmp_path: Path, server: Server, cifar10: type[CIFAR10]) -> None:
    data = CIFAR10DataModule(str(tmp_path / "new" / "data"))
    data.prepare_data()
    asked = server.requests
    data.prepare_data()
    assert server.requests == asked > 0
    assert_is_the_published_one(data)
    assert list(data.classes) == cifar10(data.root).classes


def test_it_trains_on_what_validation_leaves_and_reads_no_test_image(
    tmp_path: Path, cifar10: type[CIFAR10], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = CIFAR10DataModule(str(tmp_path), batch_size=10, val_fraction=0.5)
    data.prepare_data()
    splits = []
    start = cifar10.__init__

    def spy(self: CIFAR10, root: str, train: bool = True, **options: Any) -> None:
        splits.append(train)
        start(self, root, train, **options)

    monkeypatch.setattr(cifar10, "__init__", spy)
    data.setup("fit")
    train, val = (
        [data.augment(batch) for batch in loader] for loader in (data.train_dataloader(), data.val_dataloader())
    )
    assert splits == [True]
    assert [batch.images.shape for batch in train] == [(10, 3, 32, 32)]
    assert val[0].labels.bincount().tolist() == [1] * 10
    expected = PIXELS[val[0].ids].reshape(-1, 3, 32, 32) / 255
    for channel, (mean, std) in enumerate(zip((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), strict=True)):
        torch.testing.assert_close(
            val[0].images[:, channel].double(), torch.from_numpy((expected[:, channel] - mean) / std), rtol=0, atol=1e-6
        )
    data.setup("test")
    assert splits == [True, False]


def test_a_wrong_checksum_is_refused(tmp_path: Path, cifar10: type[CIFAR10]) -> None:
    cifar10.tgz_md5 = "0" * 32
    check_refused(CIFAR10DataModule(str(tmp_path)), cifar10, "damaged or was interrupted")


def test_an_archive_of_other_files_is_refused(tmp_path: Path, cifar10: type[CIFAR10]) -> None:
    cifar10.test_list = [["test_batch", "0" * 32]]
    check_refused(CIFAR10DataModule(str(tmp_path)), cifar10, "damaged or was interrupted")


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
def test_a_damaged_file_is_replaced_from_the_archive(
    tmp_path: Path, server: Server, cifar10: type[CIFAR10], name: str
) -> None:
    data = CIFAR10DataModule(str(tmp_path))
    data.prepare_data()
    asked = server.requests
    for damage in (flip_a_pixel, Path.unlink):
        damage(tmp_path / "cifar-10-batches-py" / name)
        with pytest.raises(RuntimeError, match="corrupted"):
            data.load("train")
        data.prepare_data()
        assert_is_the_published_one(data)
    assert server.requests == asked


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_5", "test_batch", "batches.meta"])
def test_a_pickle_is_not_opened_before_its_checksum_is_right(
    tmp_path: Path, cifar10: type[CIFAR10], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = CIFAR10DataModule("data")
    data.prepare_data()
    evil = pickle.dumps(Bomb())
    pickle.loads(evil)  # the payload is a live one
    Path("ran").rmdir()
    Path("data/cifar-10-batches-py", name).write_bytes(evil)
    for split in ("train", "test", "predict"):
        with pytest.raises(RuntimeError, match="corrupted"):
            data.load(split)
    assert not Path("ran").exists()
    cifar10.tgz_md5 = "0" * 32  # nor from an archive that is another
    check_refused(data, cifar10, "damaged or was interrupted")
    assert not Path("ran").exists()


def test_an_archive_is_not_opened_before_its_checksum_is_right(
    tmp_path: Path, server: Server, cifar10: type[CIFAR10]
) -> None:
    server.content = archived("..", {"outside": b"", "data_batch_1": pickle.dumps(Bomb())})
    check_refused(CIFAR10DataModule(str(tmp_path / "data")), cifar10, "damaged or was interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == [cifar10.filename]


def test_damaged_class_names_are_not_used(tmp_path: Path, cifar10: type[CIFAR10]) -> None:
    data = CIFAR10DataModule(str(tmp_path))
    data.prepare_data()
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(b"")
    check_refused(data, cifar10, "damaged or was interrupted")


@pytest.mark.parametrize("manner", ["half", "chunked"])
def test_an_interrupted_download_is_said_and_done_again(
    tmp_path: Path, server: Server, cifar10: type[CIFAR10], manner: str
) -> None:
    data = CIFAR10DataModule(str(tmp_path))
    server.manner = manner
    check_refused(data, cifar10, r"damaged or was interrupted \(.*\); run again, or put the file at ")
    server.manner = "whole"
    data.prepare_data()
    assert_is_the_published_one(data)


def test_a_damaged_archive_is_downloaded_again(tmp_path: Path, server: Server, cifar10: type[CIFAR10]) -> None:
    (tmp_path / cifar10.filename).write_bytes(server.content[:-1])
    data = CIFAR10DataModule(str(tmp_path))
    data.prepare_data()
    assert_is_the_published_one(data)


@pytest.mark.parametrize("how", ["no server", "no file"])
def test_without_a_network_the_message_says_where_the_file_goes(
    tmp_path: Path, server: Server, cifar10: type[CIFAR10], how: str
) -> None:
    content, data = server.content, CIFAR10DataModule(str(tmp_path))
    server.manner = "missing"
    if how == "no server":
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            cifar10.url = f"http://127.0.0.1:{closed.getsockname()[1]}/cifar-10-python.tar.gz"
            check_refused(
                data, cifar10, r"cannot be downloaded \(.*refused\); get it by other means and put the file at "
            )
    else:
        check_refused(data, cifar10, r"cannot be downloaded \(.*[Nn]ot [Ff]ound.*\); get it by other means and put ")
    (tmp_path / cifar10.filename).write_bytes(content)
    data.prepare_data()
    assert_is_the_published_one(data)


def test_cifar100_is_read_by_its_fine_labels(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    fine, names = [7 * i % 100 for i in range(26)], list(CIFAR100DataModule().classes)

    def batch(rows: slice) -> bytes:
        coarse = [label // 5 for label in fine[rows]]
        return pickled({"data": PIXELS[rows], "coarse_labels": coarse, "fine_labels": fine[rows]})

    files = {"train": batch(slice(0, 20)), "test": batch(slice(20, 26))}
    files["meta"] = pickled({"fine_label_names": names, "coarse_label_names": ["fish"]})
    server.content = archived("cifar-100-python", files)

    class Small(CIFAR100):
        url = f"http://127.0.0.1:{server.server_port}/cifar-100-python.tar.gz"
        tgz_md5 = md5(server.content)
        train_list = [["train", md5(files["train"])]]  # noqa: RUF012
        test_list = [["test", md5(files["test"])]]  # noqa: RUF012
        meta = {"filename": "meta", "key": "fine_label_names", "md5": md5(files["meta"])}  # noqa: RUF012

    monkeypatch.setattr(CIFAR100DataModule, "dataset", Small)
    data = CIFAR100DataModule(str(tmp_path))
    server.manner = "half"
    check_refused(data, Small, "damaged or was interrupted")
    server.manner = "whole"
    data.prepare_data()
    for split, rows in (("train", slice(0, 20)), ("test", slice(20, 26)), ("predict", slice(20, 26))):
        images = in_memory(data.load(split))
        assert torch.equal(images.pixels, torch.from_numpy(PIXELS[rows].reshape(-1, 3, 32, 32)))
        assert images.labels.tolist() == fine[rows]
    assert data.load("val") is None


def test_the_class_names_are_known_without_the_files() -> None:
    assert CIFAR10DataModule().classes[::9] == ("airplane", "truck")
    fine = CIFAR100DataModule().classes
    assert len(set(fine)) == len(fine) == CIFAR100DataModule().num_classes == 100
    assert list(fine) == sorted(fine)
    assert [fine[i] for i in (0, 8, 41, 57, 90, 99)] == ["apple", "bicycle", "lawn_mower", "pear", "train", "worm"]


@pytest.mark.parametrize("module", [CIFAR10DataModule, CIFAR100DataModule])
def test_the_real_datasets_are_torchvisions(module: type[CIFAR10DataModule | CIFAR100DataModule]) -> None:
    assert module.dataset in (CIFAR10, CIFAR100)
    assert module.dataset.__name__ + "DataModule" == module.__name__


def check_refused(data: CIFAR10DataModule | CIFAR100DataModule, dataset: type[CIFAR10], words: str) -> None:
    """Preparing the data fails in one sentence that says what to do; what is wrong is not read either."""
    with pytest.raises(ConnectionError, match=words) as caught:
        data.prepare_data()
    message = str(caught.value)
    assert dataset.url in message
    assert repr(str(Path(data.root) / dataset.filename)) in message
    assert message.endswith(".")
    assert "\n" not in message
    if isinstance(caught.value.__cause__, HTTPError):
        caught.value.__cause__.close()  # it holds the connection
    with pytest.raises(RuntimeError, match="corrupted"):
        data.load("train")


def flip_a_pixel(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
