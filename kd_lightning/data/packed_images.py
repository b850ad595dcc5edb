"""Decoded images of various sizes in one buffer, in memory or in a mapped file."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from kd_lightning.data.image_set import ImageSet, ImageSource, image_bytes
from kd_lightning.data.pixel_map import PixelMap
from kd_lightning.errors import UserError
from kd_lightning.files.images import UnreadableImageError, describe_unreadable
from kd_lightning.files.progress import progress

_AT_ONCE = 8
"""Images that a thread reads before it asks for more."""


@dataclass(frozen=True, eq=False)
class PackedImages:
    """Images that were read from a source once, numbered from 0.

    Other processes that they are sent to share the memory, or map the file again.

    Attributes:
        labels: int64 ``(N,)``, -1 where unlabelled.
        names: The file of each image, or its number.
        buffer: uint8, the pixels of all images one after the other, each ``(H, W, channels)``; not to be written to.
        offsets: Place of each image in the buffer, int64 ``(N,)``.
        sizes: Height and width of each image, int64 ``(N, 2)``.
        channels: Number of channels.
        key: Bytes that a fingerprint of the images covers.
        pixel_map: The mapped file, unless the buffer is in memory.
    """

    labels: Tensor
    names: Sequence[str]
    buffer: Tensor
    offsets: Tensor
    sizes: Tensor
    channels: int
    key: bytes
    pixel_map: PixelMap | None = None
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

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) if self.pixel_map is None else {**vars(self), "buffer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        mapped: PixelMap | None = state["pixel_map"]
        vars(self).update(state if mapped is None else {**state, "buffer": mapped.open()})


@dataclass(frozen=True, eq=False)
class KeptImages:
    """A source of which some images were read once.

    Attributes:
        source: The source, with its numbers.
        kept: These images, in memory or in a file.
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
        """Return an image, uint8 ``(channels, H, W)``, as it is kept, if it is."""
        place = self._places.get(sample)
        return self.source.read(sample) if place is None else self.kept.read(place)

    def name(self, sample: int) -> str:
        """Return the file of an image, or its number."""
        return self.source.name(sample)

    def content(self) -> bytes | memoryview:
        """Return what a fingerprint of the images covers."""
        return self.source.content()


def pack_in_memory(source: ImageSource, *, threads: int | None = None) -> PackedImages:
    """Read all images of a source into memory.

    Args:
        source: The images.
        threads: Number of threads that read, by default one a core; 1 for a source that is not made for threads.

    Raises:
        UserError: If an image cannot be read (with ``skip_unreadable``: none can), or has other channels.
    """
    buffer = torch.empty(image_bytes(source), dtype=torch.uint8)  # the system adds memory as it is written to
    samples, sizes, end = [], [], 0
    for sample, image in read_readable(source, threads=threads, visible=getattr(rank_zero_only, "rank", 0) == 0):
        start, end = end, end + image.numel()
        if end > len(buffer):  # sizes are those that files announce
            buffer.resize_(end + end // 8)
        height, width = image.shape[1:]
        buffer[start:end].view(height, width, -1).copy_(image.permute(1, 2, 0))
        samples.append(sample)
        sizes.append((height, width))
    return packed_images(source, samples, sizes, buffer[:end], key=bytes(source.content()))


def packed_images(
    source: ImageSource,
    samples: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    buffer: Tensor,
    *,
    key: bytes,
    pixel_map: PixelMap | None = None,
) -> PackedImages:
    """Return the images of a source whose pixels are in a buffer.

    Args:
        source: The images.
        samples: Numbers of those that are in the buffer.
        sizes: Height and width of each of them.
        buffer: Their pixels, one after the other.
        key: Bytes that a fingerprint of the images covers.
        pixel_map: The mapped file, unless the buffer is in memory.
    """
    rows, shapes = torch.tensor(samples, dtype=torch.int64), torch.tensor(sizes, dtype=torch.int64).view(-1, 2)
    numbers = shapes.prod(1) * source.channels
    return PackedImages(
        labels=source.labels[rows],
        names=[source.name(sample) for sample in samples],
        buffer=buffer,
        offsets=numbers.cumsum(0) - numbers,
        sizes=shapes,
        channels=source.channels,
        key=key,
        pixel_map=pixel_map,
    )


def stack_in_memory(source: ImageSource, *, threads: int | None = None) -> ImageSet:
    """Read all images of a source, which have one size, into memory.

    Raises:
        UserError: If an image cannot be read, or with ``skip_unreadable`` none can.
    """
    packed = pack_in_memory(source, threads=threads)
    height, width = packed.sizes[0].tolist()
    pixels = packed.buffer.view(-1, height, width, packed.channels).permute(0, 3, 1, 2)
    return ImageSet(packed.labels, pixels, tuple(map(Path, packed.names)), packed.key)


def read_readable(
    source: ImageSource, *, threads: int | None = None, visible: bool = True
) -> Iterator[tuple[int, Tensor]]:
    """Yield the number and the pixels of each image of a source, in order; read by several threads.

    A progress bar is shown if that takes longer than two seconds.

    Args:
        source: The images.
        threads: Number of threads, by default one a core.
        visible: Show the progress.

    Raises:
        UserError: At the end, one for all images that cannot be read (with ``skip_unreadable``: if none can); at once
            if an image does not have the source's channels.
    """
    errors = []
    for sample, result in _read_all(source, threads or _cores(), visible=visible):
        if isinstance(result, UnreadableImageError):
            errors.append(result)
        elif len(result) != source.channels:
            raise UserError(
                f"{source.name(sample)!r} has {len(result)} channels and the others {source.channels}; convert all to "
                "the same."
            )
        else:
            yield sample, result
    check_readable(source, errors)


def _read_all(
    source: ImageSource, threads: int, *, visible: bool
) -> Iterator[tuple[int, Tensor | UnreadableImageError]]:
    def read(samples: range) -> list[Tensor | UnreadableImageError]:
        results: list[Tensor | UnreadableImageError] = []
        for sample in samples:
            try:
                results.append(source.read(sample))
            except UnreadableImageError as error:
                results.append(error)
        return results

    count = len(source)
    waiting = deque(range(start, min(start + _AT_ONCE, count)) for start in range(0, count, _AT_ONCE))
    pool = ThreadPoolExecutor(threads)
    try:
        with progress("Decoding images", count, visible=visible) as advance:
            running = deque((part, pool.submit(read, part)) for part in _take(waiting, 4 * threads))
            while running:
                part, future = running.popleft()
                yield from zip(part, future.result(), strict=True)
                running.extend((part, pool.submit(read, part)) for part in _take(waiting, 1))
                advance(len(part))
    finally:
        pool.shutdown(cancel_futures=True)


def _take(parts: deque[range], count: int) -> list[range]:
    return [parts.popleft() for _ in range(min(count, len(parts)))]


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_readable(source: ImageSource, errors: list[UnreadableImageError]) -> None:
    """Raise an error for images that cannot be read, or name them in a warning if they may be left out."""
    if not errors:
        return
    message = describe_unreadable(errors, len(source))
    if not source.skip_unreadable or len(errors) == len(source):
        raise UserError(message)
    rank_zero_warn(f"Left out: {message}")
