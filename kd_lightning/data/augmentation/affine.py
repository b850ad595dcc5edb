"""Random rotation, scaling and shear of a whole batch, each a pure function of (seed, sample, epoch)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.data.augmentation.constants import per_channel
from kd_lightning.data.augmentation.crops import uniform
from kd_lightning.data.augmentation.full_float32 import full_float32

_STREAMS = 101, 102, 103, 104  # of random numbers, apart from the crops' and the mixing's


def draw_affine(samples: Tensor, *, seed: int, epoch: int, rotation: float, scaling: float) -> Tensor:
    r"""Draw a matrix for each sample: a rotation, times a scaling of either axis, plus a shear.

    The angle is uniform in [-``rotation``, ``rotation``], the logarithms of both scales and the shear in
    [-``scaling``, ``scaling``].

    Args:
        samples: int64 ``(B,)``.
        seed: The data module's ``view_seed``.
        epoch: Number of the epoch, from 0.
        rotation: The largest angle, in degrees.
        scaling: The largest relative stretch; 0.2 is up to a fifth.

    Returns:
        float32 ``(B, 2, 3)`` for ``torch.nn.functional.affine_grid``, without a translation.

    Example:
        >>> draw_affine(torch.tensor([5]), seed=0, epoch=0, rotation=0.0, scaling=0.0)
        tensor([[[1., 0., 0.],
                 [-0., 1., 0.]]])
    """
    angle, wide, high, shear = (2 * uniform(samples, seed=seed, epoch=epoch, stream=stream) - 1 for stream in _STREAMS)
    sine, cosine = torch.sin(angle * math.radians(rotation)), torch.cos(angle * math.radians(rotation))
    wide, high, nothing = torch.exp(wide * scaling), torch.exp(high * scaling), torch.zeros_like(angle)
    rows = torch.stack([cosine * wide, shear * scaling - sine * wide, nothing, sine * high, cosine * high, nothing], 1)
    return rows.view(-1, 2, 3)


def transform(images: Tensor, matrices: Tensor, *, background: Sequence[float]) -> Tensor:
    """Return images under affine maps, with bilinear interpolation.

    Args:
        images: Floats ``(B, channels, H, W)``.
        matrices: ``(B, 2, 3)`` of :func:`draw_affine`.
        background: Value of each channel outside the image.
    """
    level = per_channel(tuple(background), device=images.device).to(images.dtype)
    with full_float32(images.device):
        grid = F.affine_grid(matrices.to(images), list(images.shape), align_corners=False)
        return F.grid_sample(images - level, grid, align_corners=False) + level
