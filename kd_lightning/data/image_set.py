"""Stored splits: images in memory, or files that are read batch by batch."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd_lightning.data.batch import RawBatch
from kd_lightning.files.images import load_image


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in memory, numbered from 0.

    Attributes:
        labels: int64 ``(N,)``, -1 where unlabelled.
        pixels: uint8 ``(N, channels, H, W)``.
        files: Paths of the images, if they were read from files.
    """

    labels: Tensor
    pixels: Tensor
    files: Sequence[Path] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.pixels.shape[2], self.pixels.shape[3]

    def name(self, sample: int) -> str:
        """Return the file of a sample, or its number."""
        return str(self.files[sample]) if self.files else str(sample)

    def content(self) -> memoryview:
        """Return the bytes that a fingerprint of the images covers."""
        return self.pixels.contiguous().numpy().data

    def stream(self, samples: Tensor) -> Tensor:
        """Return an empty ``(B, 0)``: the pixels are gathered on the device."""
        return torch.empty((len(samples), 0), dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images that are decoded when a batch needs them, numbered from 0.

    Attributes:
        labels: int64 ``(N,)``, -1 where unlabelled.
        files: Paths of the images.
        size: Height and width to which images are resized.
    """

    labels: Tensor
    files: Sequence[Path]
    size: tuple[int, int]

    def name(self, sample: int) -> str:
        """Return the file of a sample."""
        return str(self.files[sample])

    def content(self) -> bytes:
        """Return path, size and modification time of each file, which a fingerprint of the images covers."""
        stats = [(str(file), file.stat()) for file in self.files]
        return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]).encode()

    def stream(self, samples: Tensor) -> Tensor:
        """Decode the images of a batch: uint8 ``(B, 3, H, W)``."""
        return torch.stack([read_image(self.files[sample], size=self.size) for sample in samples.tolist()])

    def in_memory(self) -> ImageSet:
        """Decode all files once, with as many threads as there are cores."""
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(lambda file: read_image(file, size=self.size), self.files))
        return ImageSet(self.labels, torch.stack(images), self.files)


def read_image(file: Path, *, size: tuple[int, int] | None = None) -> Tensor:
    """Decode a file to uint8 RGB ``(3, H, W)``.

    Raises:
        UserError: If it is not a readable image, or has 16 or 32 bits of grey; the message names it.
    """
    rgb = load_image(file, "RGB", size)
    return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3).permute(2, 0, 1)


class Subset(Dataset[RawBatch]):
    """The samples of a stored split that one loader shows; a whole batch is fetched at once.

    Args:
        images: The stored split.
        samples: int64 ``(n,)``, the chosen samples.
        split: The split's name.
        epoch: Epoch of positions that come without one, as from the sampler that Lightning inserts for
            ``overfit_batches``.
        domain: ``"source"`` or ``"target"`` in a pair of domains.
    """

    def __init__(
        self, images: ImageSet | ImageFiles, samples: Tensor, *, split: str, epoch: int = -1, domain: str = ""
    ) -> None:
        self.images = images
        self.samples = samples
        self.split = split
        self.epoch = epoch
        self.domain = domain

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: tuple[int, int] | int) -> RawBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[tuple[int, int] | int]) -> RawBatch:
        pairs = [index if isinstance(index, tuple) else (index, self.epoch) for index in indices]
        ids = self.samples[[position for position, _ in pairs]]
        pixels = self.images.stream(ids)
        return RawBatch(pixels, self.images.labels[ids], ids, pairs[0][1], self.split, self.domain)
