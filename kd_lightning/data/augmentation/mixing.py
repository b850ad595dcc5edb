"""mixup and CutMix: each image mixed with its neighbour in the batch, and the labels with it."""

from functools import cache

import torch
from torch import Tensor

from kd_lightning.data.augmentation.constants import constant
from kd_lightning.data.augmentation.crops import random_bits, uniform


def mixup(images: Tensor, labels: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor]:
    """Blend each image with the previous one in the batch.

    H. Zhang et al.: mixup: Beyond Empirical Risk Minimization, ICLR 2018, https://arxiv.org/abs/1710.09412

    Args:
        images: ``(B, channels, H, W)``.
        labels: Class probabilities ``(B, C)``.
        fraction: Weight of each image itself, in [0, 1], ``(B,)``.

    Example:
        >>> images, labels = mixup(torch.eye(2)[:, :, None, None], torch.eye(2), torch.tensor([0.75, 1.0]))
        >>> labels
        tensor([[0.7500, 0.2500],
                [0.0000, 1.0000]])
    """
    kept = fraction[:, None, None, None]
    return kept * images + (1 - kept) * images.roll(1, 0), _blend(labels, fraction)


def cutmix(images: Tensor, labels: Tensor, fraction: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Paste a box of the previous image in the batch into each image, and mix the labels by area.

    S. Yun et al.: CutMix, ICCV 2019, https://arxiv.org/abs/1905.04899

    Args:
        images: ``(B, channels, H, W)``.
        labels: Class probabilities ``(B, C)``.
        fraction: Area of each image that stays, before the box is clipped at the border, in [0, 1], ``(B,)``.
        centre: Centre of the box relative to height and width, in [0, 1), ``(B, 2)``.
    """
    side = (1 - fraction).sqrt()[:, None]
    rows = _inside(images.shape[2], centre[:, :1], side)
    columns = _inside(images.shape[3], centre[:, 1:], side)
    box = rows[:, :, None] & columns[:, None, :]
    return torch.where(box[:, None], images.roll(1, 0), images), _blend(labels, 1 - box.float().mean((1, 2)))


def mix(
    images: Tensor,
    labels: Tensor,
    samples: Tensor,
    *,
    seed: int,
    epoch: int,
    mixup_alpha: float,
    cutmix_alpha: float,
) -> tuple[Tensor, Tensor]:
    """Apply mixup or CutMix with fractions from Beta(alpha, alpha); where both are on, each to half of the images.

    The random numbers are a function of (seed, sample, epoch); the partner is the neighbour in the batch.

    Args:
        images: ``(B, channels, H, W)``.
        labels: Class probabilities ``(B, C)``.
        samples: int64 ``(B,)``.
        seed: The data module's ``view_seed``.
        epoch: Number of the epoch, from 0.
        mixup_alpha: alpha of mixup, or 0.
        cutmix_alpha: alpha of CutMix, or 0; one of the two is above 0.
    """
    quantile = random_bits(samples, seed=seed, epoch=epoch, stream=1) % _QUANTILES
    results = []
    if mixup_alpha > 0:
        fraction = constant(_beta_quantiles(mixup_alpha), device=images.device)[quantile]
        results.append(mixup(images, labels, fraction))
    if cutmix_alpha > 0:
        centre = torch.stack([uniform(samples, seed=seed, epoch=epoch, stream=stream) for stream in (2, 3)], dim=1)
        fraction = constant(_beta_quantiles(cutmix_alpha), device=images.device)[quantile]
        results.append(cutmix(images, labels, fraction, centre))
    if len(results) == 1:
        return results[0]
    first = uniform(samples, seed=seed, epoch=epoch, stream=4) < 0.5
    (mixed, mixed_labels), (pasted, pasted_labels) = results
    return (
        torch.where(first[:, None, None, None], mixed, pasted),
        torch.where(first[:, None], mixed_labels, pasted_labels),
    )


_QUANTILES = 4096


@cache
def _beta_quantiles(alpha: float) -> tuple[float, ...]:
    from scipy.stats import beta  # slow to import, and seldom needed

    quantiles = (torch.arange(_QUANTILES) + 0.5) / _QUANTILES
    return tuple(beta.ppf(quantiles.numpy(), alpha, alpha).tolist())


def _blend(labels: Tensor, fraction: Tensor) -> Tensor:
    return fraction[:, None] * labels + (1 - fraction[:, None]) * labels.roll(1, 0)


def _inside(size: int, centre: Tensor, side: Tensor) -> Tensor:
    pixels = (torch.arange(size, device=centre.device) + 0.5) / size
    return (pixels - centre).abs() < side / 2
