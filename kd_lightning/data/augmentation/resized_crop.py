"""Random resized crops: a box of random area and shape, cut out of an image and resized."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.data.augmentation.boxes import ATTEMPTS, STREAMS, draw_sides, draw_start
from kd_lightning.data.augmentation.crops import random_bits

_STREAMS = range(350, 350 + ATTEMPTS * STREAMS, STREAMS)  # of random numbers, for each attempt
_FLIPS = 399


def draw_boxes(
    samples: Tensor,
    sizes: Tensor,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    seed: int,
    view: int,
) -> Tensor:
    """Draw a box in each image, as torchvision's ``RandomResizedCrop`` does.

    C. Szegedy et al.: Going Deeper with Convolutions, CVPR 2015, https://arxiv.org/abs/1409.4842

    Its area is uniform in ``scale``, the logarithm of its width by its height uniform in that of ``ratio``, its place
    uniform. Where ten boxes do not lie inside the image it is the largest central one whose shape is in ``ratio``.

    Args:
        samples: int64 ``(B,)``.
        sizes: Height and width of each image, int64 ``(B, 2)``.
        scale: Smallest and largest area, relative to the image.
        ratio: Smallest and largest width by height.
        seed: The data module's ``view_seed``.
        view: Number of the view, from 0.

    Returns:
        Top, left, height and width, int64 ``(B, 4)``.

    Example:
        >>> draw_boxes(torch.tensor([7]), torch.tensor([[40, 60]]), scale=(1, 1), ratio=(1.5, 1.5), seed=0, view=0)
        tensor([[ 0,  0, 40, 60]])
    """
    height, width = sizes.double().unbind(1)
    boxes = _central(height, width, ratio)
    found = torch.zeros(len(samples), dtype=torch.bool)
    for stream in _STREAMS:
        wide, high = draw_sides(samples, height * width, area=scale, ratio=ratio, seed=seed, view=view, stream=stream)
        inside = (wide > 0) & (wide <= width) & (high > 0) & (high <= height)
        left = draw_start(samples, width - wide, seed=seed, view=view, stream=stream + 2)
        top = draw_start(samples, height - high, seed=seed, view=view, stream=stream + 3)
        drawn = torch.stack([top, left, high, wide], 1)
        boxes = torch.where((inside & ~found)[:, None], drawn, boxes)
        found |= inside
        if bool(found.all()):
            break
    return boxes.long()


def draw_flips(samples: Tensor, *, flip: bool, vertical_flip: bool, seed: int, view: int) -> Tensor:
    """Draw how each image is mirrored: 1 for left to right, plus 2 for top to bottom, int64 ``(B,)``."""
    return random_bits(samples, seed=seed, epoch=view, stream=_FLIPS) & (flip + 2 * vertical_flip)


def cut(image: Tensor, box: tuple[int, int, int, int], *, size: tuple[int, int], interpolation: str) -> Tensor:
    """Cut a box out of an image and resize it with antialiasing.

    Args:
        image: uint8 ``(channels, H, W)``, fastest in channels-last memory.
        box: Top, left, height and width.
        size: Height and width of the result.
        interpolation: ``"bilinear"`` or ``"bicubic"``.

    Returns:
        uint8 ``(channels, *size)``, to the bit as ``torchvision.transforms.v2.functional.resized_crop``.
    """
    top, left, height, width = box
    part = image[:, top : top + height, left : left + width]
    if (height, width) == size:
        return part
    return F.interpolate(part[None], size, mode=interpolation, antialias=True)[0]


@dataclass(frozen=True)
class ResizedCrop:
    """Cuts the views of samples: a random box of each, resized and mirrored, a function of (seed, sample, view) alone.

    Args:
        size: Height and width of the views.
        scale: Smallest and largest area, relative to the image.
        ratio: Smallest and largest width by height.
        flip: Mirror half of the views left to right.
        vertical_flip: Mirror half of the views top to bottom.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
        teacher_size: Height and width of the same views for a teacher, if they differ.
        teacher_interpolation: Interpolation of those.
        seed: The data module's ``view_seed``.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    vertical_flip: bool
    interpolation: str
    teacher_size: tuple[int, int] | None
    teacher_interpolation: str
    seed: int

    def __call__(self, images: list[Tensor], samples: Tensor, view: int) -> tuple[Tensor, Tensor | None]:
        """Return the views of images, uint8 ``(B, channels, *size)``, and those for the teacher.

        Args:
            images: uint8 ``(channels, H, W)`` of any sizes.
            samples: Their samples, int64 ``(B,)``.
            view: Number of the view, from 0.
        """
        sizes = torch.tensor([image.shape[1:] for image in images], dtype=torch.int64).view(-1, 2)
        boxes = draw_boxes(samples, sizes, scale=self.scale, ratio=self.ratio, seed=self.seed, view=view).tolist()
        flips = draw_flips(
            samples, flip=self.flip, vertical_flip=self.vertical_flip, seed=self.seed, view=view
        ).tolist()
        pixels = self._cut(images, boxes, flips, self.size, self.interpolation)
        if self.teacher_size is None:
            return pixels, None
        return pixels, self._cut(images, boxes, flips, self.teacher_size, self.teacher_interpolation)

    @staticmethod
    def _cut(
        images: list[Tensor],
        boxes: list[tuple[int, int, int, int]],
        flips: list[int],
        size: tuple[int, int],
        interpolation: str,
    ) -> Tensor:
        channels = len(images[0]) if images else 0  # none of a batch may be readable
        views = torch.empty((len(images), channels, *size), dtype=torch.uint8)
        for view, image, box, flip in zip(views, images, boxes, flips, strict=True):
            part = cut(image, box, size=size, interpolation=interpolation)
            view.copy_(part.flip(_AXES[flip]) if flip else part)
        return views


_AXES = (), (2,), (1,), (1, 2)
"""Axes along which an image is mirrored."""


def _central(height: Tensor, width: Tensor, ratio: tuple[float, float]) -> Tensor:
    shape = width / height
    wide = torch.where(shape > ratio[1], (height * ratio[1]).round(), width)
    high = torch.where(shape < ratio[0], (width / ratio[0]).round(), height)
    return torch.stack([((height - high) / 2).floor(), ((width - wide) / 2).floor(), high, wide], 1)
