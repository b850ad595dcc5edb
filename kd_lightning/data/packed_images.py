"""Decoded images of various sizes in one buffer, in memory or in a mapped file."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from kd_lightning.data.image_set import ImageSet, ImageSource
from kd_lightning.errors import UserError
from kd_lightning.files.images import UnreadableImageError, describe_unreadable
from kd_lightning.files.progress import progress


@dataclass(frozen=True, eq=False)
class PackedImages:
    """Images that were read from a source once, numbered from 0.

    Attributes:
        labels: int64 ``(N,)``, -1 where unlabelled.
        names: The file of each image, or its number.
        buffer: uint8, the pixels of all images one after the other, each ``(H, W, channels)``.
        offsets: Place of each image in the buffer, int64 ``(N,)``.
        sizes: Height and width of each image, int64 ``(N, 2)``.
        channels: Number of channels.
        key: Bytes that a fingerprint of the images covers.
    """

    labels: Tensor
    names: list[str]
    buffer: Tensor
    offsets: Tensor
    sizes: Tensor
    channels: int
    key: bytes
    skip_unreadable = False

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, sample: int) -> Tensor:
        """Return an image, uint8 ``(channels, H, W)``, as a view in channels-last memory."""
        height, width = self.sizes[sample].tolist()
        start = int(self.offsets[sample])
        pixels = self.buffer[start : start + height * width * self.channels]
        return pixels.view(height, width, self.channels).permute(2, 0, 1)

    def name(self, sample: int) -> str:
        """Return the file of an image, or its number."""
        return self.names[sample]

    def content(self) -> bytes:
        """Return what a fingerprint of the images covers."""
        return self.key


@dataclass(frozen=True, eq=False)
class KeptImages:
    """A source of which some images are kept in memory.

    Attributes:
        source: The source, with its numbers.
        kept: The images that are kept.
        samples: Their numbers in the source, int64 ``(n,)``.
    """

    source: ImageSource
    kept: PackedImages
    samples: Tensor

    @property
    def labels(self) -> Tensor:
        """Labels, int64 ``(N,)``, -1 where unlabelled."""
        return self.source.labels

    @property
    def sizes(self) -> Tensor:
        """Height and width of each image, int64 ``(N, 2)``."""
        return self.source.sizes

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.source.channels

    @property
    def skip_unreadable(self) -> bool:
        """Return whether images that cannot be read are left out."""
        return self.source.skip_unreadable

    @cached_property
    def _places(self) -> dict[int, int]:
        return {sample: place for place, sample in enumerate(self.samples.tolist())}

    def __len__(self) -> int:
        return len(self.source)

    def read(self, sample: int) -> Tensor:
        """Return an image, uint8 ``(channels, H, W)``, from memory if it is kept there."""
        place = self._places.get(sample)
        return self.source.read(sample) if place is None else self.kept.read(place)

    def name(self, sample: int) -> str:
        """Return the file of an image, or its number."""
        return self.source.name(sample)

    def content(self) -> bytes | memoryview:
        """Return what a fingerprint of the images covers."""
        return self.source.content()


def read_all(source: ImageSource) -> Iterator[tuple[int, Tensor | UnreadableImageError]]:
    """Yield each image of a source with its number, or the error, in order; read by as many threads as there are cores.

    A progress bar is shown if that takes longer than two seconds.
    """

    def read(sample: int) -> Tensor | UnreadableImageError:
        try:
            return source.read(sample)
        except UnreadableImageError as error:
            return error

    count = len(source)
    ahead = 4 * (os.cpu_count() or 1)
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress("Decoding images", count) as advance:
        pending = {sample: pool.submit(read, sample) for sample in range(min(ahead, count))}
        for sample in range(count):
            result = pending.pop(sample).result()
            if sample + ahead < count:
                pending[sample + ahead] = pool.submit(read, sample + ahead)
            yield sample, result
            advance(1)


def pack_in_memory(source: ImageSource) -> PackedImages:
    """Read all images of a source into memory.

    Raises:
        UserError: If an image cannot be read, or with ``skip_unreadable`` none can.
    """
    images, errors = [], []
    for sample, result in read_all(source):
        if isinstance(result, UnreadableImageError):
            errors.append(result)
        else:
            images.append((sample, result))
    check_readable(source, errors)
    samples = [sample for sample, _ in images]
    sizes = torch.tensor([image.shape[1:] for _, image in images], dtype=torch.int64)
    channels = images[0][1].shape[0]
    ends = (sizes.prod(1) * channels).cumsum(0)
    buffer, images = torch.empty(int(ends[-1]), dtype=torch.uint8), images[::-1]
    start = 0
    while images:  # each is freed when it is copied, so that they are in memory once
        image = images.pop()[1].permute(1, 2, 0).flatten()
        buffer[start : start + len(image)] = image
        start += len(image)
    names = [source.name(sample) for sample in samples]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
    return PackedImages(source.labels[samples], names, buffer, offsets, sizes, channels, bytes(source.content()))


def stack_in_memory(source: ImageSource) -> ImageSet:
    """Read all images of a source, which have one size, into memory.

    Raises:
        UserError: If an image cannot be read, or with ``skip_unreadable`` none can.
    """
    packed = pack_in_memory(source)
    height, width = packed.sizes[0].tolist()
    pixels = packed.buffer.view(-1, height, width, packed.channels).permute(0, 3, 1, 2)
    return ImageSet(packed.labels, pixels, tuple(map(Path, packed.names)))


def check_readable(source: ImageSource, errors: list[UnreadableImageError]) -> None:
    """Raise an error for images that cannot be read, or name them in a warning if they may be left out."""
    if not errors:
        return
    message = describe_unreadable(errors, len(source))
    if not source.skip_unreadable or len(errors) == len(source):
        raise UserError(message)
    rank_zero_warn(f"Left out: {message}")
