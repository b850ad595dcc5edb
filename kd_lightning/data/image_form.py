"""Forms in which decoded images are stored: as they are, prepared for a network, or shrunk to cut random crops from."""

from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from kd_lightning.errors import UserError
from kd_lightning.files.images import UnreadableImageError
from kd_lightning.files.prepare import RESAMPLING, Preparation, prepare


class ImageForm(Protocol):
    """A function from a decoded image to the image that is stored; its ``repr`` is part of a cache's key."""

    def __call__(self, image: Image.Image, name: str) -> Image.Image:
        """Return the image to store; ``name`` is for messages."""

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Return the size ``(H, W)`` in which an image of a size is stored."""


@dataclass(frozen=True)
class OriginalForm:
    """Images as they are, which must all have one size.

    Args:
        height: Height of all images.
        width: Width of all images.
    """

    height: int
    width: int

    def __call__(self, image: Image.Image, name: str) -> Image.Image:
        """Return the image itself."""
        if (image.height, image.width) != (self.height, self.width):
            raise UnreadableImageError(
                f"{name!r} has {image.width}x{image.height} pixels and the others {self.width}x{self.height}; set "
                "image_size to resize all images."
            )
        return image

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Return the common size."""
        return self.height, self.width


@dataclass(frozen=True)
class PreparedForm:
    """Images as a network is evaluated on them; see :func:`~kd_lightning.files.prepare.prepare`."""

    preparation: Preparation

    def __call__(self, image: Image.Image, name: str) -> Image.Image:
        """Return the prepared image."""
        return prepare(image, self.preparation)

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Return the network's size."""
        return self.preparation.size


@dataclass(frozen=True)
class ShrunkForm:
    """Whole images whose shorter side is at most ``side``, to cut random crops from.

    Args:
        side: Largest shorter side; images with a smaller one are kept as they are.
        interpolation: Filter that resizes larger ones, from a full decode.
    """

    side: int
    interpolation: str

    def __call__(self, image: Image.Image, name: str) -> Image.Image:
        """Return the smaller image."""
        height, width = self.size_of(image.height, image.width)
        if (height, width) == (image.height, image.width):
            return image
        return image.resize((width, height), RESAMPLING[self.interpolation])

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the smaller image, of the same shape."""
        factor = min(1.0, self.side / min(height, width))
        return max(1, round(height * factor)), max(1, round(width * factor))


def stored_sizes(form: ImageForm, sizes: Tensor) -> Tensor:
    """Return height and width of each image in its stored form, int64 ``(N, 2)``."""
    return torch.tensor([form.size_of(*size) for size in sizes.tolist()], dtype=torch.int64).view(-1, 2)


def to_pixels(image: Image.Image, channels: int) -> Tensor:
    """Return an image of mode ``"L"`` or ``"RGB"`` as uint8 ``(channels, H, W)`` in channels-last memory."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, channels).permute(2, 0, 1)


def mode_of(channels: int) -> str:
    """Return Pillow's mode of images with 1 or 3 channels.

    Raises:
        UserError: If there is none.
    """
    if channels not in (1, 3):
        raise UserError(f"Images are read with 3 channels, or 1 for grey, but mean has {channels} values; give 3 or 1.")
    return "L" if channels == 1 else "RGB"
