"""Downloads of all data sets from a server on this machine: complete, interrupted, damaged and impossible ones."""

import gc
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from local_server import Server
from small_sets import (
    SMALL_CIFAR10,
    SMALL_CIFAR100,
    SMALL_MNIST,
    SMALL_SVHN,
    SMALL_USPS,
    DownloadingModule,
    SmallSet,
    flipped,
)
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, USPS

from kd_lightning.data import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    MNISTDataModule,
    SVHNDataModule,
    USPSDataModule,
)

Publish = Callable[[SmallSet], Any]

SETS = [SMALL_CIFAR10, SMALL_CIFAR100, SMALL_MNIST, SMALL_SVHN, SMALL_USPS]
FILES = [(small, name) for small in SETS for name in small.files]
NOWHERE = "http://127.0.0.1:1/"

each_set = pytest.mark.parametrize("small", SETS, ids=lambda small: small.module.__name__)
each_file = pytest.mark.parametrize(("small", "name"), FILES, ids=[name for _, name in FILES])
pytestmark = [
    pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning"),  # tarfile, of torchvision's extraction
    pytest.mark.filterwarnings("ignore:dtype.* align should be passed"),  # NumPy 2.4.0, of the published pickles
]


def place_of(small: SmallSet, name: str, root: Path) -> Path:
    return root / small.folder / name


def put(small: SmallSet, root: Path, **changed: bytes) -> None:
    """Put the files where a download would, some of them with other content."""
    (root / small.folder).mkdir(parents=True, exist_ok=True)
    for name, content in (small.files | changed).items():
        place_of(small, name, root).write_bytes(content)


def unavailable(small: SmallSet, name: str, root: Path, url: str, reason: str) -> str:
    """The message about a file that cannot be downloaded, as a regular expression."""
    if small is SMALL_MNIST:
        return mnist_message(root, rf"Error downloading {re.escape(name)}: .*{reason}.*")
    return (
        rf"{re.escape(url + name)} cannot be downloaded \(.*{reason}.*\); get it by other means and put the file at "
        rf"{re.escape(repr(str(place_of(small, name, root))))}\."
    )


def damaged(small: SmallSet, name: str, root: Path, url: str) -> str:
    """The message about a file that arrived incomplete or is another, as a regular expression."""
    if small is SMALL_MNIST:
        return mnist_message(root, rf"Error downloading {re.escape(name)}: .*|IncompleteRead\(.*")
    return (
        rf"The download of {re.escape(url + name)} is damaged or was interrupted \(.*\); run again, or put the file at "
        rf"{re.escape(repr(str(place_of(small, name, root))))} by hand\."
    )


def mnist_message(root: Path, reason: str) -> str:
    return (
        rf"MNIST is not in {re.escape(repr(str(root / SMALL_MNIST.folder)))} and cannot be downloaded \(({reason})\); "
        rf"run again, or get the files by other means and put {re.escape(', '.join(SMALL_MNIST.files))} there\."
    )


def assert_refused(data: DownloadingModule, message: str) -> None:
    with pytest.raises(ConnectionError) as caught:
        data.prepare_data()
    assert re.fullmatch(message, str(caught.value))


@contextmanager
def open_connections_allowed() -> Iterator[None]:
    """Ignore that torchvision does not close the connection of an HTTP error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@each_set
def test_files_are_downloaded_once_and_read_exactly(
    small: SmallSet, publish: Publish, server: Server, tmp_path: Path
) -> None:
    publish(small)
    data = small.module(str(tmp_path / "new" / "data"))
    for expected in (set(small.files), set()):
        data.prepare_data()
        assert server.requested == expected
        server.requested.clear()
    small.assert_read_exactly(data)


@each_set
@pytest.mark.parametrize("cut", ["known length", "chunked"])
def test_an_interrupted_download_is_refused_not_read_and_repeated(
    small: SmallSet, cut: str, publish: Publish, server: Server, tmp_path: Path
) -> None:
    publish(small)
    data = small.module(str(tmp_path))
    server.cut = cut
    assert_refused(data, damaged(small, next(iter(small.files)), tmp_path, server.url))
    with pytest.raises((RuntimeError, EOFError), match=r"corrupted|not found|ended before the end-of-stream"):
        data.load("train")
    server.cut = None
    data.prepare_data()
    small.assert_read_exactly(data)


@each_file
def test_a_download_with_another_checksum_is_refused_and_not_read(
    small: SmallSet, name: str, publish: Publish, server: Server, tmp_path: Path
) -> None:
    publish(small)
    server.files[name] = flipped(small.files[name])
    data = small.module(str(tmp_path))
    assert_refused(data, damaged(small, name, tmp_path, server.url))
    with pytest.raises((RuntimeError, OSError), match=r"corrupted|not found|Invalid data stream"):
        _ = [data.load(split) for split in ("train", "test")]


@each_file
@pytest.mark.parametrize("damage", [flipped, lambda content: content[:-1]], ids=["flipped bit", "truncated"])
def test_a_damaged_file_is_downloaded_again(
    small: SmallSet,
    name: str,
    damage: Callable[[bytes], bytes],
    publish: Publish,
    server: Server,
    tmp_path: Path,
) -> None:
    publish(small)
    put(small, tmp_path, **{name: damage(small.files[name])})
    data = small.module(str(tmp_path))
    data.prepare_data()
    assert server.requested == {name}
    small.assert_read_exactly(data)


@each_file
def test_a_file_that_the_server_lacks_can_be_put_in_place_by_hand(
    small: SmallSet, name: str, publish: Publish, server: Server, tmp_path: Path
) -> None:
    publish(small)
    del server.files[name]
    data = small.module(str(tmp_path))
    with open_connections_allowed():
        assert_refused(data, unavailable(small, name, tmp_path, server.url, "[Nn]ot [Ff]ound"))
    place_of(small, name, tmp_path).write_bytes(small.files[name])
    data.prepare_data()
    small.assert_read_exactly(data)


@each_set
def test_files_can_be_put_in_place_by_hand_without_a_server(
    small: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small.module, "dataset", small.dataset_at(NOWHERE))
    data = small.module(str(tmp_path))
    assert_refused(data, unavailable(small, next(iter(small.files)), tmp_path, NOWHERE, "refused"))
    put(small, tmp_path)
    data.prepare_data()
    small.assert_read_exactly(data)


@pytest.mark.parametrize(
    ("module", "dataset"),
    [
        (CIFAR10DataModule, CIFAR10),
        (CIFAR100DataModule, CIFAR100),
        (MNISTDataModule, MNIST),
        (SVHNDataModule, SVHN),
        (USPSDataModule, USPS),
    ],
)
def test_data_modules_use_torchvisions_data_sets(module: type[DownloadingModule], dataset: type) -> None:
    assert module.dataset is dataset
