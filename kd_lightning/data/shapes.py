"""Change the size and the channels of images: of a stored set once, or of a batch on the device."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.data.augmentation.constants import per_channel
from kd_lightning.errors import UserError

_LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in grey, ITU-R BT.601


def check_size(size: int | None) -> None:
    """Raise an error if a size is below 1; ``None`` stands for the images' own."""
    if size is not None and size < 1:
        raise UserError(f"size must be >= 1, or null for the images' own, got {size}.")


def resize(images: Tensor, *, size: tuple[int, int]) -> Tensor:
    """Resize floats ``(B, channels, H, W)``, bilinear and with antialiasing where they shrink."""
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def with_channels(images: Tensor, *, channels: int) -> Tensor:
    """Repeat the grey channel of images ``(B, 1 or 3, H, W)``, or turn colours to grey by luma.

    Raises:
        UserError: If neither gives as many channels.

    Example:
        >>> with_channels(torch.rand(2, 1, 8, 8), channels=3).shape
        torch.Size([2, 3, 8, 8])
    """
    if images.shape[1] == channels:
        return images
    if sorted((images.shape[1], channels)) != [1, 3]:
        raise UserError(
            f"Images of {images.shape[1]} channels cannot be turned into {channels}, only colour (3) into grey (1) and "
            "grey into colour; give mean and std one value for each channel."
        )
    if channels == 1:
        luma = per_channel(_LUMA, device=images.device).to(images.dtype)
        return (images * luma).sum(1, keepdim=True)
    return images.repeat(1, channels, 1, 1)


def stored_with_channels(pixels: Tensor, *, channels: int) -> Tensor:
    """Return uint8 ``(N, 1 or 3, H, W)`` as :func:`with_channels` does, grey to the bit as Pillow does."""
    if (pixels.shape[1], channels) != (3, 1):
        return with_channels(pixels, channels=channels)
    weights = (torch.tensor(_LUMA, dtype=torch.float64) * 2**16).round().int()[:, None, None]
    parts = torch.split(pixels, 4096)  # integers take four times as much memory
    return torch.cat([((part * weights).sum(1, keepdim=True) + 2**15 >> 16).to(torch.uint8) for part in parts])


def statistics(values: Sequence[float], *, channels: int) -> tuple[float, ...]:
    """Return the mean (or deviation) of images after :func:`with_channels`; grey's deviation is an approximation.

    Example:
        >>> statistics((0.1307,), channels=3)
        (0.1307, 0.1307, 0.1307)
    """
    if len(values) == 3 and channels == 1:
        return (sum(weight * value for weight, value in zip(_LUMA, values, strict=True)),)
    return tuple(values) * channels if len(values) == 1 else tuple(values)


def reshape(pixels: Tensor, *, size: tuple[int, int] | None, channels: int) -> Tensor:
    """Return stored images, uint8 ``(N, 1 or 3, H, W)``, in another size (``None`` for their own) and channels."""
    size = size or (pixels.shape[2], pixels.shape[3])
    if pixels.shape[1:] == (channels, *size):
        return pixels
    parts = torch.split(pixels, 4096)  # floats take four times as much memory
    changed = (resize(with_channels(part.float(), channels=channels), size=size) for part in parts)
    return torch.cat([part.round_().to(torch.uint8) for part in changed])
