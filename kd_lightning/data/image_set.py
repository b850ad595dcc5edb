"""Stored splits: images in memory, or files that are read batch by batch."""

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from kd_lightning.data.batch import RawBatch
from kd_lightning.errors import UserError
from kd_lightning.files.images import UnreadableImageError, describe_unreadable, load_image


class Decoded(NamedTuple):
    """The images of some samples.

    Attributes:
        pixels: uint8 ``(n, channels, H, W)`` of the n readable images; ``(B, 0)`` of images in memory.
        rows: The place of each readable image among the B samples.
        errors: Errors of the others.
    """

    pixels: Tensor
    rows: list[int]
    errors: list[UnreadableImageError]


class PartialBatch(NamedTuple):
    """A batch without the images that cannot be read.

    A worker hands it to :class:`~kd_lightning.data.loader.ImageLoader`, which raises the errors unless
    ``skip_unreadable``: torch would put a worker's traceback into the message of an error that was raised there.
    """

    batch: RawBatch
    errors: list[UnreadableImageError]
    skip_unreadable: bool


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
    skip_unreadable = False

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

    def stream(self, samples: Tensor) -> Decoded:
        """Return empty pixels ``(B, 0)``: they are gathered on the device."""
        return Decoded(torch.empty((len(samples), 0), dtype=torch.uint8), list(range(len(samples))), [])


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images that are decoded when a batch needs them, numbered from 0.

    Attributes:
        labels: int64 ``(N,)``, -1 where unlabelled.
        files: Paths of the images.
        size: Height and width of the images.
        resize: Resize images to that size, in place of an error for another size.
        channels: 3 for RGB, 1 for grey.
        skip_unreadable: Leave out images that cannot be read, and name them in a warning, in place of an error.
    """

    labels: Tensor
    files: Sequence[Path]
    size: tuple[int, int]
    resize: bool = True
    channels: int = 3
    skip_unreadable: bool = False

    def name(self, sample: int) -> str:
        """Return the file of a sample."""
        return str(self.files[sample])

    def content(self) -> bytes:
        """Return path, size and modification time of each file, which a fingerprint of the images covers."""
        stats = [(str(file), file.stat()) for file in self.files]
        return json.dumps([_DECODING, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]).encode()

    def stream(self, samples: Tensor) -> Decoded:
        """Decode the images of a batch."""
        return self._decode(samples.tolist(), map)

    def in_memory(self) -> ImageSet:
        """Decode all files once, with as many threads as there are cores.

        Raises:
            UserError: If an image cannot be read, or with ``skip_unreadable`` none can.
        """
        with ThreadPoolExecutor() as pool, torch.inference_mode(False):  # threads could not write to such a tensor
            pixels, rows, errors = self._decode(range(len(self.files)), pool.map)
        if not errors:
            return ImageSet(self.labels, pixels, self.files)
        message = describe_unreadable(errors, len(self.files))
        if not (self.skip_unreadable and rows):
            raise UserError(message)
        rank_zero_warn(f"Left out: {message}")
        return ImageSet(self.labels[rows], pixels, [self.files[row] for row in rows])

    def _decode(self, samples: Sequence[int], apply: Callable[..., Iterable[UnreadableImageError | None]]) -> Decoded:
        pixels = torch.empty((len(samples), self.channels, *self.size), dtype=torch.uint8)

        def read(row: int) -> UnreadableImageError | None:
            try:
                pixels[row] = self._read(self.files[samples[row]])
            except UnreadableImageError as error:
                return error
            return None

        results = list(apply(read, range(len(samples))))
        errors = [error for error in results if error is not None]
        rows = [row for row, error in enumerate(results) if error is None]
        return Decoded(pixels[rows] if errors else pixels, rows, errors)

    def _read(self, file: Path) -> Tensor:
        pixels = read_image(file, size=self.size if self.resize else None, channels=self.channels)
        height, width = pixels.shape[1:]
        if (height, width) != self.size:
            raise UnreadableImageError(
                f"{str(file)!r} has {width}x{height} pixels and the others {self.size[1]}x{self.size[0]}; set "
                "image_size to resize all images."
            )
        return pixels


_DECODING = "upright, on white"
"""What is done to all images; fingerprints of images that were decoded otherwise differ."""


def read_image(file: Path, *, size: tuple[int, int] | None = None, channels: int = 3) -> Tensor:
    """Decode a file to uint8 ``(channels, H, W)`` as a viewer shows it; see :func:`load_image`.

    Raises:
        UnreadableImageError: If it is not a readable image, or has 16 or 32 bits of grey; the message names it.
    """
    image = load_image(file, "L" if channels == 1 else "RGB", size)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, channels).permute(2, 0, 1)


class Subset(Dataset[RawBatch | PartialBatch]):
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

    def __getitem__(self, index: tuple[int, int] | int) -> RawBatch | PartialBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[tuple[int, int] | int]) -> RawBatch | PartialBatch:
        pairs = [index if isinstance(index, tuple) else (index, self.epoch) for index in indices]
        ids = self.samples[[position for position, _ in pairs]]
        pixels, rows, errors = self.images.stream(ids)
        ids = ids[rows] if errors else ids
        batch = RawBatch(pixels, self.images.labels[ids], ids, pairs[0][1], self.split, self.domain)
        return PartialBatch(batch, errors, self.images.skip_unreadable) if errors else batch
