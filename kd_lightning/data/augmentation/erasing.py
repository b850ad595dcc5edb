"""Random erasing: a box of an image is set to the mean."""

from typing import NamedTuple

import torch
from torch import Tensor

from kd_lightning.data.augmentation.boxes import ATTEMPTS, STREAMS, draw_sides, draw_start
from kd_lightning.data.augmentation.crops import uniform

_STREAMS = range(301, 301 + ATTEMPTS * STREAMS, STREAMS)  # of random numbers, for each attempt
_AREA = (0.02, 0.33)
_RATIO = (0.3, 3.3)


class Erasing(NamedTuple):
    """The boxes that are erased in a batch.

    Attributes:
        rows: Rows of the images, int64 ``(E,)``.
        boxes: Top, left, bottom and right of the box in each, int64 ``(E, 4)``.
    """

    rows: Tensor
    boxes: Tensor


def draw_erasing(samples: Tensor, *, probability: float, size: tuple[int, int], seed: int, view: int) -> Erasing:
    """Draw the box that is erased in each image, as torchvision's ``RandomErasing`` does.

    Z. Zhong et al.: Random Erasing Data Augmentation, AAAI 2020, https://arxiv.org/abs/1708.04896

    Its area is uniform in 2 to 33 % of the image, the logarithm of its height by its width in that of 0.3 to 3.3.

    Args:
        samples: int64 ``(R,)``.
        probability: Probability that an image is erased.
        size: Height and width of the images.
        seed: The data module's ``view_seed``.
        view: Number of the view, from 0.

    Returns:
        The rows that are erased, which are fewer where ten boxes do not fit.

    Example:
        >>> draw_erasing(torch.tensor([3]), probability=1.0, size=(32, 32), seed=0, view=0).boxes.shape
        torch.Size([1, 4])
    """
    height, width = size
    boxes = torch.zeros((len(samples), 4), dtype=torch.int64)
    open_rows = uniform(samples, seed=seed, epoch=view, stream=300) < probability
    for stream in _STREAMS:
        if not bool(open_rows.any()):
            break
        high, wide = draw_sides(samples, height * width, area=_AREA, ratio=_RATIO, seed=seed, view=view, stream=stream)
        top = draw_start(samples, height - high, seed=seed, view=view, stream=stream + 2)
        left = draw_start(samples, width - wide, seed=seed, view=view, stream=stream + 3)
        fits = open_rows & (high < height) & (wide < width)
        drawn = torch.stack([top, left, top + high, left + wide], 1).long()
        boxes = torch.where(fits[:, None], drawn, boxes)
        open_rows &= ~fits
    rows = boxes.any(1).nonzero().flatten()
    return Erasing(rows, boxes[rows])


def erase_(images: Tensor, erasing: Erasing, *, scale: float = 1.0) -> Tensor:
    """Set boxes of normalized images to 0, which is the mean, in place; return the images.

    Args:
        images: Floats ``(R, channels, H, W)``.
        erasing: From :func:`draw_erasing`, on the same device.
        scale: Factor of the boxes, for the same views at another size.

    Example:
        >>> erase_(torch.ones(1, 1, 2, 2), Erasing(torch.tensor([0]), torch.tensor([[0, 0, 1, 2]]))).flatten()
        tensor([0., 0., 1., 1.])
    """
    edges = erasing.boxes if scale == 1.0 else (erasing.boxes.float() * scale).round()
    top, left, bottom, right = edges[:, :, None].unbind(1)
    y, x = (torch.arange(length, device=images.device) for length in images.shape[2:])
    inside = ((y >= top) & (y < bottom))[:, None, :, None] & ((x >= left) & (x < right))[:, None, None, :]
    chosen = images.index_select(0, erasing.rows).masked_fill_(inside, 0.0)
    return images.index_copy_(0, erasing.rows, chosen)
