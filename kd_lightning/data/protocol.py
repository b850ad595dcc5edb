"""Protocols: the parts of a data module that modules, teachers and callbacks may use."""

from collections.abc import Iterable, Mapping
from typing import Protocol, TypeGuard, runtime_checkable

from torch import Tensor

from kd_lightning.data.batch import RawBatch
from kd_lightning.networks.data_config import DataConfig


class LabelledSet(Protocol):
    """A stored split, as far as other packages read it."""

    @property
    def labels(self) -> Tensor:
        """Class indices ``(N,)``, -1 where unlabelled; ``(N, C)`` of multi-label data."""


class ImageData(Protocol):
    """A data module of this package: it has checked its labels and knows the shape and the classes of its images.

    :class:`~kd_lightning.data.module.ImageDataModule` and
    :class:`~kd_lightning.data.domain_pair.DomainPairDataModule` fulfil it.
    """

    predict_split: str
    """The split that ``predict`` shows."""

    @property
    def splits(self) -> Mapping[str, LabelledSet]:
        """The splits read so far, whose labels were checked."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the labels."""

    @property
    def num_classes(self) -> int:
        """The number of classes, C."""

    @property
    def multi_label(self) -> bool:
        """Return whether an image may have several classes."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean of each channel of images in [0, 1]."""

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation of each channel."""

    @property
    def batch_size(self) -> int:
        """Images in a training batch of one process."""

    @property
    def views(self) -> int | None:
        """The number of fixed views of each training image, or ``None`` if each epoch shows a new one."""

    @property
    def views_in_batch(self) -> int:
        """The number of views of each image in a training batch, 1 or 2: first all of one, then all of the other."""

    @property
    def yields_pairs(self) -> bool:
        """Return whether a training batch is ``{"source": Batch, "target": Batch}``."""

    @property
    def mixes_images(self) -> bool:
        """Return whether mixup or CutMix blends training images and their labels."""

    def has_labels(self, split: str) -> bool:
        """Return whether an image of ``"train"`` or ``"val"`` is labelled, in a pair of domains one of the source."""

    @property
    def all_labelled(self) -> bool:
        """Return whether every image in a training batch is labelled, in a batch of two domains those of the source."""

    def image_name(self, split: str, sample: int) -> str:
        """Return the file of a sample, or its number."""

    def faster_reading(self) -> list[str]:
        """Return imperatives with the settings that shorten the time in which training waits for images."""


class ViewData(ImageData, Protocol):
    """A data module whose training images can be shown in fixed views, so that outputs for them can be cached."""

    @property
    def views(self) -> int:
        """The number of fixed views of each training image."""

    @property
    def train_samples(self) -> Tensor:
        """The samples of the stored training images that are trained on."""

    def view_dataloader(self, view: int) -> Iterable[RawBatch]:
        """Return this rank's part of the training images, each once, in one of the fixed views."""

    def fingerprint(self) -> dict[str, str]:
        """Return what determines the training images of each view."""


@runtime_checkable
class KnowsInputs(Protocol):
    """A module that knows what its networks expect of their input."""

    def known_inputs(self) -> dict[str, DataConfig]:
        """Return what the networks expect, by name and in the order in which the data follow them."""


@runtime_checkable
class FollowsNetworks(Protocol):
    """A data module whose sizes and statistics are those of the networks, unless they are given."""

    def follow_networks(self, known: Mapping[str, DataConfig]) -> None:
        """Take what is not given from the first network that knows it."""


def is_image_data(data: object) -> TypeGuard[ImageData]:
    """Return whether a data module is one of this package (or behaves like one), rather than any of Lightning's.

    Only ``splits`` is tested: other members may read the images when they are used.

    Example:
        >>> from kd_lightning import DigitsDataModule
        >>> is_image_data(DigitsDataModule()), is_image_data(None)
        (True, False)
    """
    return hasattr(data, "splits")


def is_multi_label(data: object) -> bool:
    """Return whether a data module declares that an image may have several classes: ``multi_label`` is true.

    Labels are then 1 for each class of an image and 0 for the others, ``(B, C)``. Nothing else declares it: rows of
    floats mean class probabilities.

    Example:
        >>> from kd_lightning import DigitsDataModule
        >>> is_multi_label(DigitsDataModule()), is_multi_label(None)
        (False, False)
    """
    return bool(getattr(data, "multi_label", False))


def has_fixed_views(data: object) -> TypeGuard[ViewData]:
    """Return whether the training images of a data module come in a fixed number of views."""
    return getattr(data, "views", None) is not None
