"""mixup and CutMix: an image and its labels mixed with those of a partner, each choice drawn on the host."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kd_lightning.data.augmentation.crops import random_bits, uniform


class Mixing(NamedTuple):
    """The rows of a batch that are mixed: first those of mixup, then those of CutMix.

    Fractions are integers in units of 2^-24: under ``bf16-true`` Lightning rounds the floats of a batch to bfloat16.

    Attributes:
        rows: Rows that are mixed, int64 ``(M,)``.
        partners: The sample that each is mixed with, int64 ``(M,)``.
        fraction: Weight of each row itself under mixup, int32 ``(m,)``.
        box: Box of the partner under CutMix, (top, left, bottom, right) relative to the image, int32 ``(M - m, 4)``.
    """

    rows: Tensor
    partners: Tensor
    fraction: Tensor
    box: Tensor


def draw_mixing(
    samples: Tensor,
    *,
    candidates: Tensor,
    labelled: Tensor,
    seed: int,
    view: int,
    mixup: float,
    cutmix: float,
) -> Mixing | None:
    """Draw the partner of each labelled row and how it is mixed in; ``None`` if nothing is mixed.

    Fractions are from Beta(alpha, alpha); where both methods are on, each is applied to half of the images. All is a
    function of (seed, sample, view).

    H. Zhang et al.: mixup: Beyond Empirical Risk Minimization, ICLR 2018, https://arxiv.org/abs/1710.09412

    S. Yun et al.: CutMix, ICCV 2019, https://arxiv.org/abs/1905.04899

    Args:
        samples: int64 ``(B,)``.
        candidates: The samples that may be partners, int64 ``(n,)``: labelled ones that are trained on.
        labelled: Which rows have a label, bool ``(B,)``; the others are not mixed.
        seed: The data module's ``view_seed``.
        view: Number of the view, from 0.
        mixup: alpha of mixup, or 0.
        cutmix: alpha of CutMix, or 0.
    """
    rows = labelled.nonzero().flatten()
    if not (mixup > 0 or cutmix > 0) or not len(rows):
        return None
    pastes = torch.full_like(rows, cutmix > 0, dtype=torch.bool)
    if mixup > 0 and cutmix > 0:
        pastes = uniform(samples[rows], seed=seed, epoch=view, stream=4) >= 0.5
    rows = torch.cat([rows[~pastes], rows[pastes]])
    mixed, blended = samples[rows], int((~pastes).sum())
    partners = candidates[random_bits(mixed, seed=seed, epoch=view, stream=5) % len(candidates)]
    quantile = random_bits(mixed, seed=seed, epoch=view, stream=1) % _QUANTILES
    fraction = to_units(_fractions(mixup)[quantile[:blended]] if blended else torch.empty(0))
    if blended == len(rows):
        return Mixing(rows, partners, fraction, to_units(torch.empty(0, 4)))
    pasted = mixed[blended:]
    half = (1 - _fractions(cutmix)[quantile[blended:]]).sqrt()[:, None] / 2
    centre = torch.stack([uniform(pasted, seed=seed, epoch=view, stream=stream) for stream in (2, 3)], 1)
    box = torch.cat([centre - half, centre + half], 1).clamp(0, 1)
    return Mixing(rows, partners, fraction, to_units(box))


def to_units(fractions: Tensor) -> Tensor:
    """Return fractions in [0, 1] as int32 in units of 2^-24.

    Example:
        >>> to_units(torch.tensor([0.5])), from_units(to_units(torch.tensor([0.5])))
        (tensor([8388608], dtype=torch.int32), tensor([0.5000]))
    """
    return (fractions * _UNITS).round().int()


def from_units(counts: Tensor) -> Tensor:
    """Return the fractions, float32, of :func:`to_units`."""
    return counts.float() / _UNITS


def mix_(
    images: Tensor, partner_images: Tensor, labels: Tensor, partner_labels: Tensor, mixing: Mixing
) -> tuple[Tensor, Tensor]:
    """Mix some images with their partners in place; return them, and mixed labels.

    The labels of CutMix are mixed by the number of pixels in the box.

    Args:
        images: ``(B, channels, H, W)``.
        partner_images: ``(M, channels, H, W)``.
        labels: Class probabilities ``(B, C)``, or of several classes 0 and 1.
        partner_labels: Class indices ``(M,)``, or as ``labels``.
        mixing: From :func:`draw_mixing`, on the same device.

    Example:
        >>> fraction, no_box = to_units(torch.tensor([0.75])), to_units(torch.empty(0, 4))
        >>> mixing = Mixing(torch.tensor([1]), torch.tensor([7]), fraction, no_box)
        >>> images, partners = torch.zeros(2, 1, 1, 1), torch.ones(1, 1, 1, 1)
        >>> mixed, labels = mix_(images, partners, torch.eye(2), torch.tensor([0]), mixing)
        >>> mixed.flatten(), labels[1]
        (tensor([0.0000, 0.2500]), tensor([0.2500, 0.7500]))
    """
    blended, share = len(mixing.fraction), from_units(mixing.fraction)
    if blended:
        rows, partners = mixing.rows[:blended], partner_images[:blended]
        kept = share[:, None, None, None].to(images.dtype)
        images.index_copy_(0, rows, torch.lerp(partners, images.index_select(0, rows), kept))
    if len(mixing.box):
        rows, partners = mixing.rows[blended:], partner_images[blended:]
        inside = _inside(from_units(mixing.box), height=images.shape[2], width=images.shape[3])
        images.index_copy_(0, rows, torch.where(inside[:, None], partners, images.index_select(0, rows)))
        share = torch.cat([share, 1 - inside.float().mean((1, 2))])
    share = share[:, None]
    if partner_labels.dim() == 1:
        partner_labels = partner_labels[:, None] == torch.arange(labels.shape[1], device=labels.device)
    mixed = share * labels.index_select(0, mixing.rows) + (1 - share) * partner_labels
    return images, labels.index_copy(0, mixing.rows, mixed)


def _inside(box: Tensor, *, height: int, width: int) -> Tensor:
    """Return which pixels have their middle in a box, bool ``(M, H, W)``."""
    top, left, bottom, right = box[:, :, None].unbind(1)
    y, x = ((torch.arange(length, dtype=torch.float32, device=box.device) + 0.5) / length for length in (height, width))
    return ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None, :]


_UNITS = 1 << 24
_QUANTILES = 4096


@cache
def _fractions(alpha: float) -> Tensor:
    """Return quantiles of Beta(alpha, alpha), float32 ``(4096,)``."""
    from scipy.stats import beta  # slow to import, and seldom needed

    quantiles = (torch.arange(_QUANTILES, dtype=torch.float64, device="cpu") + 0.5) / _QUANTILES
    return torch.from_numpy(beta.ppf(quantiles.numpy(), alpha, alpha)).float()
