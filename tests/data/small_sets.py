"""CIFAR, MNIST, SVHN and USPS with 29 images each, in files of the published formats.

torchvision's data sets get the addresses and checksums of these files, and check them as they do the published ones.
"""

import bz2
import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.io
import torch
from reading import in_memory
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, USPS

from kd_lightning.data import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    MNISTDataModule,
    SVHNDataModule,
    USPSDataModule,
)

DownloadingModule = CIFAR10DataModule | CIFAR100DataModule | MNISTDataModule | SVHNDataModule | USPSDataModule

ROWS = {"train": slice(0, 20), "test": slice(20, 29), "predict": slice(20, 29)}


@dataclass(frozen=True)
class SmallSet:
    """A published data set with few images.

    Attributes:
        module: Data module that reads it.
        pixels: uint8 ``(29, channels, H, W)``, the training images before the test images.
        labels: int64 ``(29,)``.
        files: Content of the published files by name.
        dataset_at: Returns torchvision's data set for these files at an address.
        folder: Folder of the files below the root of the data.
    """

    module: type[DownloadingModule]
    pixels: Tensor
    labels: Tensor
    files: dict[str, bytes]
    dataset_at: Callable[[str], Any]
    folder: str = ""

    def assert_read_exactly(self, data: DownloadingModule) -> None:
        """Fail unless a data module reads these images and labels."""
        for split, rows in ROWS.items():
            images = in_memory(data.load(split))
            assert (images.pixels.dtype, images.labels.dtype) == (torch.uint8, torch.int64)
            assert torch.equal(images.pixels, self.pixels[rows])
            assert images.pixels.is_contiguous()
            assert torch.equal(images.labels, self.labels[rows])
        assert data.load("val") is None


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def flipped(content: bytes) -> bytes:
    """Return content of which one bit is changed."""
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    return bytes(changed)


def _random_pixels(channels: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (29, channels, size, size), dtype=torch.uint8, generator=generator)


_DIGITS = torch.arange(29) % 10


# --- CIFAR: pickles of Python 2 in an archive


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 did, with which the files were published."""

    dispatch: ClassVar[dict[type, Callable[..., None]]] = pickle._Pickler.dispatch.copy()
    write: Callable[[bytes], Any]  # which pickle._Pickler sets

    def save_string(self, value: str | bytes) -> None:
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)

    dispatch[str] = dispatch[bytes] = save_string


def pickled(content: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    written = file.getvalue()
    for ours, published in ((b"numpy._core", b"numpy.core"), (b"u1\x89\x88\x87", b"u1K\x00K\x01\x87")):
        written = written.replace(ours, published)
    return written


def archived(folder: str, files: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def _cifar10() -> SmallSet:
    pixels = _random_pixels(3, 32)
    rows = {f"data_batch_{i + 1}": slice(4 * i, 4 * i + 4) for i in range(5)} | {"test_batch": ROWS["test"]}
    files = {}
    for name, part in rows.items():
        labels, data = _DIGITS[part].tolist(), pixels[part].flatten(1).numpy()
        filenames = [f"{i}.png" for i in range(29)][part]
        files[name] = pickled({"batch_label": name, "labels": labels, "data": data, "filenames": filenames})
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    meta = pickled({"num_cases_per_batch": 4, "label_names": classes, "num_vis": 3072})
    archive = archived("cifar-10-batches-py", files | {"batches.meta": meta})

    def dataset_at(url: str) -> Any:
        lists = {
            "train_list": [[name, md5(content)] for name, content in files.items() if name != "test_batch"],
            "test_list": [["test_batch", md5(files["test_batch"])]],
            "meta": {"filename": "batches.meta", "key": "label_names", "md5": md5(meta)},
        }
        return type("CIFAR10", (CIFAR10,), {"url": url + CIFAR10.filename, "tgz_md5": md5(archive)} | lists)

    return SmallSet(CIFAR10DataModule, pixels, _DIGITS, {CIFAR10.filename: archive}, dataset_at)


def _cifar100() -> SmallSet:
    pixels, labels = _random_pixels(3, 32), 7 * torch.arange(29) % 100
    files = {}
    for name in ("train", "test"):
        data, fine = pixels[ROWS[name]].flatten(1).numpy(), labels[ROWS[name]].tolist()
        files[name] = pickled({"data": data, "coarse_labels": [label // 5 for label in fine], "fine_labels": fine})
    names = {"fine_label_names": list(CIFAR100DataModule.classes), "coarse_label_names": ["fish"]}
    files["meta"] = pickled(names)
    archive = archived("cifar-100-python", files)

    def dataset_at(url: str) -> Any:
        lists = {
            "train_list": [["train", md5(files["train"])]],
            "test_list": [["test", md5(files["test"])]],
            "meta": {"filename": "meta", "key": "fine_label_names", "md5": md5(files["meta"])},
        }
        return type("CIFAR100", (CIFAR100,), {"url": url + CIFAR100.filename, "tgz_md5": md5(archive)} | lists)

    return SmallSet(CIFAR100DataModule, pixels, labels, {CIFAR100.filename: archive}, dataset_at)


# --- MNIST: idx files


def idx(array: np.ndarray[Any, Any]) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def _mnist() -> SmallSet:
    pixels = _random_pixels(1, 28)
    files = {}
    for split, rows in (("train", ROWS["train"]), ("t10k", ROWS["test"])):
        files[f"{split}-images-idx3-ubyte.gz"] = gzip.compress(idx(pixels[rows, 0].numpy()))
        files[f"{split}-labels-idx1-ubyte.gz"] = gzip.compress(idx(_DIGITS[rows].byte().numpy()))

    def dataset_at(url: str) -> Any:
        resources = [(name, md5(content)) for name, content in files.items()]
        return type("MNIST", (MNIST,), {"mirrors": [url], "resources": resources})

    return SmallSet(MNISTDataModule, pixels, _DIGITS, files, dataset_at, folder="MNIST/raw")


# --- SVHN: MATLAB's files; USPS: text of libsvm


def _svhn() -> SmallSet:
    pixels = _random_pixels(3, 32)
    files = {}
    for split in ("train", "test"):
        file, digits = io.BytesIO(), _DIGITS[ROWS[split]].byte()[:, None]
        digits[digits == 0] = 10  # as it is published
        scipy.io.savemat(file, {"X": pixels[ROWS[split]].permute(2, 3, 1, 0).numpy(), "y": digits.numpy()})
        files[f"{split}_32x32.mat"] = file.getvalue()

    def dataset_at(url: str) -> Any:
        by_split = {name.partition("_")[0]: [url + name, name, md5(content)] for name, content in files.items()}
        return type("SVHN", (SVHN,), {"split_list": by_split})

    return SmallSet(SVHNDataModule, pixels, _DIGITS, files, dataset_at)


def _usps() -> SmallSet:
    pixels = _random_pixels(1, 16)
    names = {"train": "usps.bz2", "test": "usps.t.bz2"}
    files = {}
    for split, name in names.items():
        lines = []
        for image, label in zip(pixels[ROWS[split]].flatten(1).tolist(), _DIGITS[ROWS[split]].tolist(), strict=True):
            # a thousandth above, since torchvision rounds down
            values = " ".join(f"{i + 1}:{(pixel + 0.001) / 255 * 2 - 1:.7f}" for i, pixel in enumerate(image))
            lines.append(f"{label + 1} {values} \n")
        files[name] = bz2.compress("".join(lines).encode())

    def dataset_at(url: str) -> Any:
        by_split = {split: [url + name, name, md5(files[name])] for split, name in names.items()}
        return type("USPS", (USPS,), {"split_list": by_split})

    return SmallSet(USPSDataModule, pixels, _DIGITS, files, dataset_at)


SMALL_CIFAR10, SMALL_CIFAR100, SMALL_MNIST, SMALL_SVHN, SMALL_USPS = _cifar10(), _cifar100(), _mnist(), _svhn(), _usps()
