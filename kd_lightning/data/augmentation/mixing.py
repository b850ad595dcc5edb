"""mixup and CutMix: an image and its labels mixed with those of a partner, each choice drawn on the host."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kd_lightning.data.augmentation.crops import random_bits, uniform


class Mixing(NamedTuple):
    """Which rows of a batch are mixed, and how.

    Attributes:
        rows: Rows that are mixed, int64 ``(M,)``.
        partners: The sample that each is mixed with, int64 ``(M,)``.
        fraction: mixup's weight of each row itself, float32 ``(M,)``; 1 under CutMix.
        box: CutMix's box (top, left, bottom, right) relative to the image, float32 ``(M, 4)``; zeros under mixup.
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
    mixed = samples[rows]

    def draw(stream: int) -> Tensor:
        return uniform(mixed, seed=seed, epoch=view, stream=stream)

    partners = candidates[random_bits(mixed, seed=seed, epoch=view, stream=5) % len(candidates)]
    quantile = random_bits(mixed, seed=seed, epoch=view, stream=1) % _QUANTILES
    pastes = torch.full_like(mixed, cutmix > 0, dtype=torch.bool)
    if mixup > 0 and cutmix > 0:
        pastes = draw(4) >= 0.5
    blend = _fractions(mixup)[quantile] if mixup > 0 else torch.ones(len(rows))
    kept = _fractions(cutmix)[quantile] if cutmix > 0 else torch.ones(len(rows))
    half, centre = (1 - kept).sqrt()[:, None] / 2, torch.stack([draw(2), draw(3)], 1)
    box = torch.cat([centre - half, centre + half], 1).clamp(0, 1)
    return Mixing(rows, partners, torch.where(pastes, 1.0, blend), torch.where(pastes[:, None], box, 0.0))


def mix(
    images: Tensor, partner_images: Tensor, labels: Tensor, partner_labels: Tensor, mixing: Mixing
) -> tuple[Tensor, Tensor]:
    """Return images and labels of which some rows are mixed with their partners.

    The labels of CutMix are mixed by the number of pixels in the box.

    Args:
        images: ``(B, channels, H, W)``.
        partner_images: ``(M, channels, H, W)``.
        labels: Class probabilities ``(B, C)``.
        partner_labels: Class indices ``(M,)``.
        mixing: From :func:`draw_mixing`, on the same device.

    Example:
        >>> mixing = Mixing(torch.tensor([1]), torch.tensor([7]), torch.tensor([0.75]), torch.zeros(1, 4))
        >>> images, partners = torch.zeros(2, 1, 1, 1), torch.ones(1, 1, 1, 1)
        >>> mixed, labels = mix(images, partners, torch.eye(2), torch.tensor([0]), mixing)
        >>> mixed.flatten(), labels[1]
        (tensor([0.0000, 0.2500]), tensor([0.2500, 0.7500]))
    """
    own, (height, width) = images.index_select(0, mixing.rows), images.shape[2:]
    top, left, bottom, right = mixing.box[:, :, None].unbind(1)
    y, x = ((torch.arange(length, device=images.device) + 0.5) / length for length in (height, width))
    inside = ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None, :]
    kept = mixing.fraction[:, None, None, None]
    mixed = torch.where(inside[:, None], partner_images, torch.lerp(partner_images, own, kept.to(own.dtype)))
    share = (mixing.fraction * (1 - inside.float().mean((1, 2))))[:, None]
    own_labels = labels.index_select(0, mixing.rows)
    classes = torch.arange(labels.shape[1], device=labels.device)
    mixed_labels = share * own_labels + (1 - share) * (partner_labels[:, None] == classes)
    return images.index_copy(0, mixing.rows, mixed), labels.index_copy(0, mixing.rows, mixed_labels)


_QUANTILES = 4096


@cache
def _fractions(alpha: float) -> Tensor:
    """Return quantiles of Beta(alpha, alpha), float32 ``(4096,)``."""
    from scipy.stats import beta  # slow to import, and seldom needed

    quantiles = (torch.arange(_QUANTILES, device="cpu") + 0.5) / _QUANTILES
    return torch.from_numpy(beta.ppf(quantiles.numpy(), alpha, alpha)).float()
