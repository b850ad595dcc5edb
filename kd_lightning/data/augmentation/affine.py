"""Random rotation, scaling and shear of a whole batch, each a pure function of (seed, sample, epoch)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.data.augmentation.crops import uniform

_STREAMS = 101, 102, 103, 104  # of random numbers, apart from the crops' and the mixing's


def draw_affine(seed: int, samples: Tensor, epoch: int, rotation: float, scaling: float) -> Tensor:
    r"""A matrix for each sample: a rotation, times a scaling of either axis, plus a shear.

    The angle is uniform in [-``rotation``, ``rotation``], the logarithms of both scales and the shear in
    [-``scaling``, ``scaling``].

    Args:
        seed: The data module's ``view_seed``.
        samples: int64 ``(B,)``.
        epoch: From 0.
        rotation: The largest angle, in degrees.
        scaling: 0.2 is up to a fifth.

    Returns:
        float32 ``(B, 2, 3)`` as ``torch.nn.functional.affine_grid`` takes them; nothing is shifted.

    Example:
        >>> draw_affine(0, torch.tensor([5]), epoch=0, rotation=0.0, scaling=0.0)
        tensor([[[1., 0., 0.],
                 [-0., 1., 0.]]])
    """
    angle, wide, high, shear = (2 * uniform(seed, samples, epoch, stream) - 1 for stream in _STREAMS)
    sine, cosine = torch.sin(angle * math.radians(rotation)), torch.cos(angle * math.radians(rotation))
    wide, high, nothing = torch.exp(wide * scaling), torch.exp(high * scaling), torch.zeros_like(angle)
    rows = torch.stack([cosine * wide, shear * scaling - sine * wide, nothing, sine * high, cosine * high, nothing], 1)
    return rows.view(-1, 2, 3)


def transform(images: Tensor, matrices: Tensor, background: Sequence[float]) -> Tensor:
    """Images ``(B, channels, H, W)`` under matrices ``(B, 2, 3)``, bilinear; what comes into view is background.

    Args:
        images: Floats.
        matrices: See :func:`draw_affine`.
        background: A value for each channel.
    """
    level = images.new_tensor(list(background))[:, None, None]
    grid = F.affine_grid(matrices.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images - level, grid, align_corners=False) + level
