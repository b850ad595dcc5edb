"""Other sizes and channels: of a set once, when it is read, or of a batch on the device."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.errors import UserError

_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey, ITU-R BT.601


def check_size(size: int | None) -> None:
    """Make sure that a size is one.

    Raises:
        ValueError: If it is below 1.
    """
    if size is not None and size < 1:
        raise UserError(f"size must be >= 1, or null for the images' own, got {size}.")


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Floats ``(B, channels, H, W)`` in another size, bilinear; where they shrink, each pixel is a mean of many."""
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Floats ``(B, 1 or 3, H, W)`` with other channels: grey repeated, or colour turned to grey.

    Example:
        >>> with_channels(torch.rand(2, 1, 8, 8), 3).shape
        torch.Size([2, 3, 8, 8])
    """
    if images.shape[1] == channels:
        return images
    if channels == 1:
        return (images * images.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
    return images.repeat(1, channels, 1, 1)


def statistics(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """The mean (or deviation) of images whose channels :func:`with_channels` changes; grey's deviation is nearly this.

    Example:
        >>> statistics((0.1307,), 3)
        (0.1307, 0.1307, 0.1307)
    """
    if len(values) == 3 and channels == 1:
        return (sum(weight * value for weight, value in zip(_LUMA, values, strict=True)),)
    return tuple(values) * channels if len(values) == 1 else tuple(values)


def reshaped(pixels: Tensor, size: tuple[int, int] | None, channels: int) -> Tensor:
    """A stored set, uint8 ``(N, 1 or 3, H, W)``, in another size (``None`` for its own) and with other channels."""
    size = size or (pixels.shape[2], pixels.shape[3])
    if pixels.shape[1:] == (channels, *size):
        return pixels
    parts = pixels.split(4096)  # floats take four times as much memory
    return torch.cat([resize(with_channels(part.float(), channels), size).round_().to(torch.uint8) for part in parts])
