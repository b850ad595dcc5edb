"""Stored splits: images in memory, or images that are read or cut batch by batch."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd_lightning.data.augmentation.resized_crop import ResizedCrop
from kd_lightning.data.augmentation.two_views import SecondView
from kd_lightning.data.augmentation.view_plan import ViewDrawer
from kd_lightning.data.batch import RawBatch
from kd_lightning.data.image_form import ImageForm, mode_of, stored_sizes, to_pixels
from kd_lightning.files.images import UnreadableImageError, load_image


class Decoded(NamedTuple):
    """The images of some samples.

    Attributes:
        pixels: uint8 ``(n, channels, H, W)`` of the n readable images; ``(B, 0)`` of images in memory.
        rows: The place of each readable image among the B samples.
        errors: Errors of the others.
        teacher_pixels: The same images at the size of a teacher, if that differs.
        second: ``pixels`` and ``teacher_pixels`` of a second view, where these are not the same.
    """

    pixels: Tensor
    rows: list[int]
    errors: list[UnreadableImageError]
    teacher_pixels: Tensor | None = None
    second: tuple[Tensor, Tensor | None] | None = None


class PartialBatch(NamedTuple):
    """A batch without the images that cannot be read.

    A worker hands it to :class:`~kd_lightning.data.loader.ImageLoader`, which raises the errors unless
    ``skip_unreadable``: torch would put a worker's traceback into the message of an error that was raised there.
    """

    batch: RawBatch
    errors: list[UnreadableImageError]
    skip_unreadable: bool


class ImageSource(Protocol):
    """Images that can be read one by one, each as uint8 ``(channels, H, W)``, numbered from 0."""

    @property
    def labels(self) -> Tensor:
        """The labels, int64 ``(N,)``, -1 where unlabelled; of several classes floats ``(N, C)``."""

    @property
    def sizes(self) -> Tensor:
        """Height and width of each image, int64 ``(N, 2)``, as far as they are known before it is read."""

    @property
    def channels(self) -> int:
        """Number of channels."""

    @property
    def skip_unreadable(self) -> bool:
        """True if images that cannot be read are left out, and named in a warning, in place of an error."""

    def __len__(self) -> int:
        """Return the number of images."""

    def read(self, sample: int) -> Tensor:
        """Return an image; raise :class:`UnreadableImageError` if it cannot be read."""

    def name(self, sample: int) -> str:
        """Return the file of an image, or its number."""

    def content(self) -> bytes | memoryview:
        """Return what a fingerprint of the images covers."""


def image_bytes(source: ImageSource) -> int:
    """Return the number of bytes of all images of a source."""
    return int(source.sizes.prod(1).sum()) * source.channels


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size in memory, numbered from 0.

    Attributes:
        labels: int64 ``(N,)``, -1 where unlabelled.
        pixels: uint8 ``(N, channels, H, W)``.
        files: Paths of the images, if they were read from files.
        key: Bytes that a fingerprint of the images covers, if these are not the pixels.
    """

    labels: Tensor
    pixels: Tensor
    files: Sequence[Path] = ()
    key: bytes = b""
    skip_unreadable = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.pixels.shape[2], self.pixels.shape[3]

    @property
    def sizes(self) -> Tensor:
        """Height and width of each image, int64 ``(N, 2)``."""
        return torch.tensor(self.size).expand(len(self), 2)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.pixels.shape[1]

    def read(self, sample: int) -> Tensor:
        """Return an image, uint8 ``(channels, H, W)``."""
        return self.pixels[sample]

    def name(self, sample: int) -> str:
        """Return the file of a sample, or its number."""
        return str(self.files[sample]) if self.files else str(sample)

    def content(self) -> bytes | memoryview:
        """Return the bytes that a fingerprint of the images covers."""
        return self.key or self.pixels.contiguous().numpy().data

    def stream(self, samples: Tensor, view: int, second_crop: ResizedCrop | None = None) -> Decoded:
        """Return empty pixels ``(B, 0)``: they are gathered on the device."""
        return Decoded(torch.empty((len(samples), 0), dtype=torch.uint8), list(range(len(samples))), [])


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files, decoded when they are read and brought into the form in which they are stored.

    Attributes:
        labels: int64 ``(N,)``, -1 where unlabelled.
        files: Paths of the images.
        original_sizes: Height and width of each image in its file, int64 ``(N, 2)``.
        form: Brings each image into its stored form.
        channels: 3 for RGB, 1 for grey.
        skip_unreadable: Leave out images that cannot be read, and name them in a warning, in place of an error.
    """

    labels: Tensor
    files: Sequence[Path]
    original_sizes: Tensor
    form: ImageForm
    channels: int = 3
    skip_unreadable: bool = False

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def sizes(self) -> Tensor:
        """Height and width of each image in its stored form, int64 ``(N, 2)``."""
        return stored_sizes(self.form, self.original_sizes)

    def read(self, sample: int) -> Tensor:
        """Decode an image, uint8 ``(channels, H, W)``."""
        return read_image(self.files[sample], self.form, channels=self.channels)

    def name(self, sample: int) -> str:
        """Return the file of a sample."""
        return str(self.files[sample])

    def content(self) -> bytes:
        """Return path, size and modification time of each file, which a fingerprint of the images covers."""
        stats = [(str(file), file.stat()) for file in self.files]
        decoding = [_DECODING, repr(self.form), self.channels]
        return json.dumps([*decoding, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]).encode()


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """A split whose batches are put together on the host: images that are read, and cut if a crop is given.

    Attributes:
        images: Images in their stored form.
        size: Height and width in a batch.
        crop: Cuts random boxes out of them; ``None`` where they have the size already.
        plain: Images as they are evaluated, where ``images`` are in another form or have another size.
        teacher_images: Training images for a teacher, where they are not cut and not the same.
        teacher_plain: Images as a teacher is evaluated on them, where they are not the same.
        given_labels: Labels in place of those of the images.
    """

    images: ImageSource
    size: tuple[int, int]
    crop: ResizedCrop | None = None
    plain: ImageSource | None = None
    teacher_images: ImageSource | None = None
    teacher_plain: ImageSource | None = None
    given_labels: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        """Labels, int64 ``(N,)``, -1 where unlabelled."""
        return self.images.labels if self.given_labels is None else self.given_labels

    @property
    def skip_unreadable(self) -> bool:
        """Return whether images that cannot be read are left out."""
        return self.images.skip_unreadable

    def __len__(self) -> int:
        return len(self.images)

    def name(self, sample: int) -> str:
        """Return the file of a sample, or its number."""
        return self.images.name(sample)

    def content(self) -> bytes | memoryview:
        """Return what a fingerprint of the images covers: also how they are cut, and those for a teacher."""
        if self.crop is None and self.teacher_images is None:
            return self.images.content()
        digest = hashlib.sha256(self.images.content())
        digest.update(repr(self.crop).encode())
        if self.teacher_images is not None:
            digest.update(self.teacher_images.content())
        return digest.digest()

    def stream(self, samples: Tensor, view: int, second_crop: ResizedCrop | None = None) -> Decoded:
        """Return the images of a batch.

        Args:
            samples: int64 ``(B,)``.
            view: Number of the view, -1 for images without augmentation.
            second_crop: Cuts a second view out of the same images.
        """
        if view >= 0 and self.crop is not None:
            images, rows, errors = _read(self.images, samples)
            pixels, teacher_pixels = self.crop(images, samples[rows], view)
            second = None if second_crop is None else second_crop(images, samples[rows], view)
            return Decoded(pixels, rows, errors, teacher_pixels, second)
        source, for_teacher = self.images, self.teacher_images
        if view < 0:
            source, for_teacher = self.plain or self.images, self.teacher_plain
        images, rows, errors = _read(source, samples)
        pixels = torch.stack(images) if images else torch.empty((0, 0), dtype=torch.uint8)
        if for_teacher is None:
            return Decoded(pixels, rows, errors)
        return Decoded(pixels, rows, errors, torch.stack(_read(for_teacher, samples[rows])[0]))


def with_labels(images: ImageSet | StreamedImages, labels: Tensor) -> ImageSet | StreamedImages:
    """Return the same images with other labels, int64 ``(N,)``, or floats ``(N, C)`` of several classes."""
    if isinstance(images, ImageSet):
        return replace(images, labels=labels)
    return replace(images, given_labels=labels)


def _read(source: ImageSource, samples: Tensor) -> tuple[list[Tensor], list[int], list[UnreadableImageError]]:
    images, rows, errors = [], [], []
    for row, sample in enumerate(samples.tolist()):
        try:
            images.append(source.read(sample))
            rows.append(row)
        except UnreadableImageError as error:
            errors.append(error)
    return images, rows, errors


_DECODING = "upright, on white"
"""What is done to all images; fingerprints of images that were decoded otherwise differ."""


def read_image(file: Path, form: ImageForm | None = None, *, channels: int = 3) -> Tensor:
    """Decode a file to uint8 ``(channels, H, W)`` as a viewer shows it; see :func:`load_image`.

    Raises:
        UnreadableImageError: If it is not a readable image, or has 16 or 32 bits of grey; the message names it.
    """
    image = load_image(file, mode_of(channels))
    return to_pixels(image if form is None else form(image, str(file)), channels)


@dataclass(frozen=True, eq=False)
class Selection:
    """Some images of a source, numbered from 0.

    Attributes:
        source: The source.
        samples: The chosen images, int64 ``(n,)``.
    """

    source: ImageSource
    samples: Tensor

    @property
    def labels(self) -> Tensor:
        """Labels of the chosen images."""
        return self.source.labels[self.samples]

    @property
    def sizes(self) -> Tensor:
        """Height and width of each chosen image."""
        return self.source.sizes[self.samples]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.source.channels

    @property
    def skip_unreadable(self) -> bool:
        """Return whether images that cannot be read are left out."""
        return self.source.skip_unreadable

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, sample: int) -> Tensor:
        """Return an image by its place among the chosen ones."""
        return self.source.read(int(self.samples[sample]))

    def name(self, sample: int) -> str:
        """Return the file of an image, or its number."""
        return self.source.name(int(self.samples[sample]))

    def content(self) -> bytes:
        """Return what a fingerprint of the images covers."""
        return bytes(self.source.content()) + self.samples.numpy().tobytes()


class Subset(Dataset[RawBatch | PartialBatch]):
    """The samples of a stored split that one loader shows; a whole batch is fetched at once.

    Args:
        images: The stored split.
        samples: int64 ``(n,)``, the chosen samples.
        split: The split's name.
        epoch: Epoch of positions that come without one, as from the sampler that Lightning inserts for
            ``overfit_batches``.
        domain: ``"source"`` or ``"target"`` in a pair of domains.
        labels: Labels in place of the stored ones.
        draw: Draws the changes to training images beside crops and flips.
        second_view: Makes a second view, if a training batch has two of each image.

    Attributes:
        plain: Show images without augmentation, whatever the epoch.
        place: Function that copies samples, their labels and an epoch to the device on which the images are kept;
            ``None`` where they are not kept on one, or a plan is drawn for each batch.
    """

    place: Callable[[Tensor, Tensor, int], RawBatch] | None = None

    def __init__(
        self,
        images: ImageSet | StreamedImages,
        samples: Tensor,
        *,
        split: str,
        epoch: int = -1,
        domain: str = "",
        labels: Tensor | None = None,
        draw: ViewDrawer | None = None,
        second_view: SecondView | None = None,
    ) -> None:
        self.images = images
        self.labels = images.labels if labels is None else labels
        self.samples = samples
        self.split = split
        self.epoch = epoch
        self.domain = domain
        self.draw = draw
        self.second_view = second_view
        self.plain = False

    def __len__(self) -> int:
        return len(self.samples)

    def placed(self, positions: Tensor, epoch: int) -> RawBatch | None:
        """Return the samples at some positions as one batch on the device, if the images are kept on it."""
        if self.place is None:
            return None
        ids = self.samples[positions]
        return self.place(ids, self.labels[ids], -1 if self.plain else epoch)

    def __getitem__(self, index: tuple[int, int] | int) -> RawBatch | PartialBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[tuple[int, int] | int]) -> RawBatch | PartialBatch:
        pairs = [index if isinstance(index, tuple) else (index, self.epoch) for index in indices]
        ids, epoch = self.samples[[position for position, _ in pairs]], -1 if self.plain else pairs[0][1]
        view = epoch if self.draw is None else self.draw.view_of_epoch(epoch)
        plan = None if self.draw is None else self.draw(ids, self.labels[ids], epoch)
        second = self.second_view if epoch >= 0 else None
        pixels, rows, errors, teacher_pixels, cut_again = self.images.stream(
            ids if plan is None else plan.samples, view, None if second is None else second.crop
        )
        if errors:  # of training images, which have a plan, none is left out: what counts is the message
            ids = ids[rows] if plan is None else plan.samples[rows].unique()
            errors = list({str(error): error for error in errors}.values())  # an image may be a partner too
        batch = RawBatch(pixels, self.labels[ids], ids, epoch, self.split, self.domain, plan, teacher_pixels)
        if second is not None and not errors:
            pixels, teacher_pixels = (pixels, teacher_pixels) if cut_again is None else cut_again
            drawn = second.draw(ids, batch.labels, epoch)
            batch = batch._replace(second=batch._replace(pixels=pixels, teacher_pixels=teacher_pixels, plan=drawn))
        return PartialBatch(batch, errors, self.images.skip_unreadable) if errors else batch
