"""Random boxes of an image, for crops and for erasing."""

import math

import torch
from torch import Tensor

from kd_lightning.data.augmentation.crops import uniform

ATTEMPTS = 10
"""Boxes that are drawn for an image until one fits."""
STREAMS = 4
"""Streams of random numbers that an attempt takes: two for :func:`draw_sides`, two for the place."""


def draw_sides(
    samples: Tensor,
    pixels: Tensor | int,
    *,
    area: tuple[float, float],
    ratio: tuple[float, float],
    seed: int,
    view: int,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """Draw the sides of a box for each sample.

    Their product is uniform in ``area``, the logarithm of the first by the second uniform in that of ``ratio``.

    Args:
        samples: int64 ``(B,)``.
        pixels: Number of pixels of each image, ``(B,)``, or of all.
        area: Smallest and largest area, relative to the image.
        ratio: Smallest and largest quotient of the sides.
        seed: The data module's ``view_seed``.
        view: Number of the view, from 0.
        stream: Number of the random numbers; the one behind it is used too.

    Returns:
        Whole numbers as float64 ``(B,)``, which may be larger than the image.
    """
    size, shape = (uniform(samples, seed=seed, epoch=view, stream=stream + number).double() for number in range(2))
    target = pixels * (area[0] + (area[1] - area[0]) * size)
    quotient = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * shape)
    return (target * quotient).sqrt().round(), (target / quotient).sqrt().round()


def draw_start(samples: Tensor, room: Tensor, *, seed: int, view: int, stream: int) -> Tensor:
    """Draw where a side begins: a whole number from 0 to ``room``, the length of the image less that of the side."""
    return (uniform(samples, seed=seed, epoch=view, stream=stream).double() * (room + 1)).floor()
