"""The samples of a map-style data set: an image in one of several forms, and its class or classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from kd_lightning.data.image_form import mode_of
from kd_lightning.errors import UserError
from kd_lightning.files.images import as_shown
from kd_lightning.networks.data_config import truncate

Label = int | tuple[int, ...]
"""A class index, -1 where there is none; of images that may have several classes the indices of all of them."""


@dataclass(frozen=True)
class Samples:
    """The samples of a data set, as ``(image, label)``.

    Attributes:
        dataset: Anything with a length and ``dataset[i]``, which is ``(image, label, ...)`` or a mapping.
        name: Name of the argument that it was given as, for messages.
        image_key: Key of the image in a mapping.
        label_key: Key of the label in a mapping.
    """

    dataset: Any
    name: str
    image_key: str
    label_key: str

    def __post_init__(self) -> None:
        if isinstance(self.dataset, IterableDataset) or not all(
            hasattr(self.dataset, method) for method in ("__len__", "__getitem__")
        ):
            raise UserError(
                f"{self.name} must have a length and dataset[i], which {type(self.dataset).__name__} does not have; "
                "collect its samples in a list, or give the Trainer a DataLoader of your own."
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        sample = self.dataset[number]
        if isinstance(sample, Mapping):
            for key in (self.image_key, self.label_key):
                if key not in sample:
                    there = ", ".join(map(repr, sample))
                    raise UserError(
                        f"Sample {number} of {self.name} has no {key!r}, but {there}; set image_key and label_key."
                    )
            return sample[self.image_key], sample[self.label_key]
        if not isinstance(sample, tuple | list) or len(sample) < 2:
            raise UserError(
                f"Sample {number} of {self.name} must be (image, label) or a mapping, got {type(sample).__name__}; "
                "change what the data set returns."
            )
        return sample[0], sample[1]

    def image(self, number: int, channels: int) -> Image.Image:
        """Return the image of a sample as a viewer shows it, with 1 or 3 channels."""
        return as_shown(self._picture(self[number][0], number), mode_of(channels))

    def label(self, number: int) -> Label:
        """Return the label of a sample, -1 where it is ``None``."""
        return self._label(self[number][1], number)

    def label_and_size(self, number: int) -> tuple[Label, tuple[int, int]]:
        """Return the label of a sample, -1 where it is ``None``, and height and width of its image."""
        image, label = self[number]
        shown = as_shown(self._picture(image, number), "L")  # turned as a viewer turns it
        return self._label(label, number), (shown.height, shown.width)

    def _label(self, label: Any, number: int) -> Label:
        if isinstance(label, Tensor):
            label = label.numpy()
        if isinstance(label, np.ndarray) and label.size == 1:
            label = label.item()
        if isinstance(label, list | tuple):
            return self._several(label, number)
        return -1 if label is None else self._class_index(label, number)

    def _several(self, label: Sequence[Any], number: int) -> tuple[int, ...]:
        """Return the indices of an image's classes: a row of 0 and 1 would have one of them twice."""
        indices = tuple(self._class_index(index, number) for index in label)
        if len({*indices}) < len(indices) or min(indices, default=0) < 0:
            raise UserError(
                f"The label of sample {number} of {self.name} must list the index of each of its classes once, got "
                f"{truncate(list(map(str, indices)))}; convert it in the data set, a row of 0 and 1 too."
            )
        return indices

    def _class_index(self, label: Any, number: int) -> int:
        if isinstance(label, bool | np.bool_) or not isinstance(label, int | np.integer):
            raise UserError(
                f"The label of sample {number} of {self.name} must be an integer, a list of them if an image may have "
                f"several classes, or None, got {type(label).__name__}; convert it in the data set."
            )
        return int(label)

    def _picture(self, image: Any, number: int) -> Image.Image:
        if isinstance(image, Image.Image):
            return image
        pixels = image.numpy() if isinstance(image, Tensor) else image
        if not isinstance(pixels, np.ndarray) or pixels.ndim not in (2, 3):
            raise UserError(
                f"The image of sample {number} of {self.name} must be a PIL image or a tensor (channels, H, W), got "
                f"{type(image).__name__}; change what the data set returns."
            )
        if isinstance(image, Tensor) and pixels.ndim == 3:
            pixels = pixels.transpose(1, 2, 0)
        if pixels.dtype.kind == "f":
            if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
                raise UserError(
                    f"The image of sample {number} of {self.name} has values outside [0, 1]; remove Normalize from its "
                    "transform, since the data module normalizes with mean and std."
                )
            pixels = np.rint(pixels * 255).astype(np.uint8)
        if pixels.dtype != np.uint8 or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)):
            raise UserError(
                f"The image of sample {number} of {self.name} must have bytes or floats and 1 or 3 channels, got "
                f"{pixels.dtype} {tuple(image.shape)}; a tensor is (channels, H, W), an array (H, W, channels)."
            )
        return Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
