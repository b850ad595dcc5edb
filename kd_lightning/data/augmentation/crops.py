"""Crops and flips of a whole batch, each a pure function of (seed, sample, epoch).

Four channels of a pixel are packed into one int32, so that a batch of augmented images is one gather.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kd_lightning.data.augmentation.constants import per_channel
from kd_lightning.errors import UserError


class Crops(NamedTuple):
    """The place of each image in its padded one, and its flips.

    Attributes:
        top: First row, int64 ``(B,)``.
        left: First column, int64 ``(B,)``.
        mirrored: 1 where mirrored left to right, plus 2 where top to bottom, int32 ``(B,)``.
    """

    top: Tensor
    left: Tensor
    mirrored: Tensor

    def select(self, rows: Tensor) -> "Crops":
        """Return the crops of some rows."""
        return Crops(*(values.index_select(0, rows) for values in self))


def random_bits(samples: Tensor, *, seed: int, epoch: int, stream: int = 0) -> Tensor:
    """Return 48 random bits for each sample, equal on every device and in every batch (SplitMix64 over the four keys).

    G. Steele, D. Lea, C. Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014

    Args:
        samples: int64, any shape.
        seed: Any integer.
        epoch: Any integer.
        stream: A number for each independent use.

    Returns:
        int64 of the same shape, in [0, 2^48).

    Example:
        >>> bits = random_bits(torch.arange(4), seed=0, epoch=0)
        >>> torch.equal(bits[2:], random_bits(torch.tensor([2, 3]), seed=0, epoch=0))
        True
    """
    state = torch.zeros_like(samples)
    for key in (seed, epoch, stream):
        state = _mix(state + _as_int64(key) + _GOLDEN)
    state = _mix(state + samples + _GOLDEN)
    return (state >> 16) & ((1 << 48) - 1)


def uniform(samples: Tensor, *, seed: int, epoch: int, stream: int = 0) -> Tensor:
    """Return a float32 in [0, 1) for each sample; see :func:`random_bits`."""
    return (random_bits(samples, seed=seed, epoch=epoch, stream=stream) >> 24).float() / (1 << 24)


def draw_crops(
    samples: Tensor, *, seed: int, epoch: int, padding: int, flip: bool, vertical_flip: bool = False
) -> Crops:
    """Draw the crop and the flips of each sample in an epoch.

    Args:
        samples: int64 ``(B,)``.
        seed: The data module's ``view_seed``.
        epoch: Number of the epoch, from 0; -1 for the centre without a flip.
        padding: Pixels by which an image was padded on each side.
        flip: Mirror half of the views left to right.
        vertical_flip: Mirror half of the views top to bottom.
    """
    if epoch < 0:
        centre = torch.full_like(samples, padding)
        return Crops(centre, centre, torch.zeros_like(samples, dtype=torch.int32))
    bits = random_bits(samples, seed=seed, epoch=epoch)
    positions = 2 * padding + 1
    mirrored = (bits >> 40) & (flip + 2 * vertical_flip)  # two bits, of which each counts where it is asked for
    return Crops((bits & 0xFFFFF) % positions, ((bits >> 20) & 0xFFFFF) % positions, mirrored.int())


def pack(images: Tensor, *, padding: int) -> Tensor:
    """Pad images with zeros and pack the channels of each pixel into one integer.

    Args:
        images: uint8 ``(N, channels, H, W)`` with 1 to 4 channels.
        padding: Pixels on each side, p.

    Returns:
        int32 ``(N, H + 2p, W + 2p)``.

    Raises:
        UserError: If the images are of another type or have more than four channels.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or not 1 <= images.shape[1] <= 4:
        raise UserError(f"Images are stored as uint8 (N, 1 to 4, H, W), got {images.dtype} {tuple(images.shape)}.")
    count, channels, height, width = images.shape
    packed = images.new_zeros((count, height + 2 * padding, width + 2 * padding, 4))
    inside = slice(padding, padding + height), slice(padding, padding + width)
    packed[:, inside[0], inside[1], :channels] = images.permute(0, 2, 3, 1)
    return packed.view(torch.int32).squeeze(-1)


class Places(NamedTuple):
    """The pixels of each image of a batch in a packed set.

    Attributes:
        first: Number of the first pixel in the flattened set, int32 ``(B,)``, or int64 where that is too short.
        mirrored: Flips as in :class:`Crops`, int32 ``(B,)``.
        view: Number of the view whose crops they are.
    """

    first: Tensor
    mirrored: Tensor
    view: int = 0

    def between(self, start: int, stop: int) -> "Places":
        """Return the places of neighbouring images; nothing is copied."""
        return Places(self.first[start:stop], self.mirrored[start:stop], self.view)


def find_places(packed: Tensor, rows: Tensor, crops: Crops, *, view: int = 0) -> Places:
    """Return the place of each crop in packed images.

    Args:
        packed: Images of :func:`pack`, ``(N, H + 2p, W + 2p)``.
        rows: int64 ``(B,)``, the row of each image in ``packed``.
        crops: Positions of the crops, ``(B,)``.
        view: Number of the view whose crops they are.
    """
    _, height, width = packed.shape
    first = (rows * height + crops.top) * width + crops.left
    return Places(first.to(_index_type(packed)), crops.mirrored, view)


def gather_crops(packed: Tensor, rows: Tensor, crops: Crops, *, padding: int) -> Tensor:
    """Cut the crops of a batch out of packed images in one gather; see :func:`find_places` and :func:`gather_places`.

    Args:
        packed: Images of :func:`pack`, ``(N, H + 2p, W + 2p)``.
        rows: int64 ``(B,)``, the row of each image in ``packed``.
        crops: Positions of the crops, ``(B,)``.
        padding: Pixels on each side, p.

    Returns:
        Packed as well, int32 ``(B, H, W)``.
    """
    return gather_places(packed, find_places(packed, rows, crops), padding=padding)


def gather_places(packed: Tensor, places: Places, *, padding: int) -> Tensor:
    """Gather the pixels of images whose places are known.

    Args:
        packed: Images of :func:`pack`, ``(N, H + 2p, W + 2p)``.
        places: Places of the crops.
        padding: Pixels on each side, p.

    Returns:
        Packed as well, int32 ``(B, H, W)``.
    """
    _, padded_height, padded_width = packed.shape
    height, width = padded_height - 2 * padding, padded_width - 2 * padding
    windows = _windows(height, width, padded_width, _index_type(packed), packed.device)
    index = windows.index_select(0, places.mirrored).add_(places.first[:, None])
    return packed.view(-1).index_select(0, index.view(-1)).view(-1, height, width)


def _index_type(packed: Tensor) -> torch.dtype:
    return torch.int32 if packed.numel() < 2**31 else torch.int64  # half the memory traffic where it fits


@cache
def _windows(height: int, width: int, stride: int, kind: torch.dtype, device: torch.device) -> Tensor:
    """Return the pixels of an image, relative to its first: plain, mirrored left to right, top to bottom, both."""
    lines = torch.arange(height, dtype=kind, device=device)[:, None] * stride
    across = torch.arange(width, dtype=kind, device=device)
    return torch.stack([(y + x).flatten() for y in (lines, lines.flip(0)) for x in (across, across.flip(0))])


def unpack(pixels: Tensor, *, channels: int) -> Tensor:
    """Return packed pixels ``(B, H, W)`` as int32 ``(B, channels, H, W)`` with values from 0 to 255."""
    # a pixel's first byte is its lowest: shifts are far faster than a strided view of the bytes
    return torch.bitwise_right_shift(pixels[:, None], _shifts(channels, pixels.device)).bitwise_and_(255)


@cache
def _shifts(channels: int, device: torch.device) -> Tensor:
    return (8 * torch.arange(channels, dtype=torch.int32, device=device)).view(-1, 1, 1)


def normalize(images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return ``(image / 255 - mean) / std`` for each channel, as float32.

    Args:
        images: Integers ``(B, channels, H, W)`` from 0 to 255.
        mean: Mean of each channel of images in [0, 1].
        std: Standard deviation of each channel.
    """
    scale = per_channel(tuple(1 / (255 * s) for s in std), device=images.device)
    shift = per_channel(tuple(-m / s for m, s in zip(mean, std, strict=True)), device=images.device)
    return images.mul(scale).add_(shift)  # to float32 as well


_GOLDEN = -0x61C8864680B583EB  # 2^64 divided by the golden ratio, as a signed number


def _as_int64(key: int) -> int:
    return (key + (1 << 63)) % (1 << 64) - (1 << 63)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shifted(bits, 30)) * -0x40A7B892E31B1A47
    bits = (bits ^ _shifted(bits, 27)) * -0x6B2FB644ECCEEE15
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    return (bits >> by) & ((1 << (64 - by)) - 1)
