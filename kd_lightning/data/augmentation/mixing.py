"""mixup and CutMix: each image mixed with its neighbour in the batch, and the labels with it."""

from functools import cache

import torch
from torch import Tensor

from kd_lightning.data.augmentation.crops import random_bits, uniform


def mixup(images: Tensor, labels: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Blend each image with the one before it in the batch.

    H. Zhang et al.: mixup: Beyond Empirical Risk Minimization, ICLR 2018, https://arxiv.org/abs/1710.09412

    Args:
        images: ``(B, channels, H, W)``.
        labels: Class probabilities ``(B, C)``.
        share: How much of each image stays, in [0, 1], ``(B,)``.

    Example:
        >>> images, labels = mixup(torch.eye(2)[:, :, None, None], torch.eye(2), torch.tensor([0.75, 1.0]))
        >>> labels
        tensor([[0.7500, 0.2500],
                [0.0000, 1.0000]])
    """
    kept = share[:, None, None, None]
    return kept * images + (1 - kept) * images.roll(1, 0), _blend(labels, share)


def cutmix(images: Tensor, labels: Tensor, share: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Paste a box of the one before it in the batch into each image; labels are mixed by the area that stays.

    S. Yun et al.: CutMix, ICCV 2019, https://arxiv.org/abs/1905.04899

    Args:
        images: ``(B, channels, H, W)``.
        labels: Class probabilities ``(B, C)``.
        share: How much of each image stays before the box is clipped at the border, in [0, 1], ``(B,)``.
        centre: Of the box, as a share of height and width, in [0, 1), ``(B, 2)``.
    """
    side = (1 - share).sqrt()[:, None]
    rows = _inside(images.shape[2], centre[:, :1], side)
    columns = _inside(images.shape[3], centre[:, 1:], side)
    box = rows[:, :, None] & columns[:, None, :]
    return torch.where(box[:, None], images.roll(1, 0), images), _blend(labels, 1 - box.float().mean((1, 2)))


def mix(
    images: Tensor, labels: Tensor, samples: Tensor, seed: int, epoch: int, mixup_alpha: float, cutmix_alpha: float
) -> tuple[Tensor, Tensor]:
    """Mixup or CutMix with shares from Beta(alpha, alpha), both (half of the images each) where both are above 0.

    What is drawn is a function of (seed, sample, epoch); the partner is the neighbour in the batch.
    """
    place = random_bits(seed, samples, epoch, stream=1) % _QUANTILES
    results = []
    if mixup_alpha > 0:
        results.append(mixup(images, labels, _shares(mixup_alpha, images.device)[place]))
    if cutmix_alpha > 0:
        centre = torch.stack([uniform(seed, samples, epoch, stream) for stream in (2, 3)], dim=1)
        results.append(cutmix(images, labels, _shares(cutmix_alpha, images.device)[place], centre))
    if len(results) == 1:
        return results[0]
    first = uniform(seed, samples, epoch, stream=4) < 0.5
    (mixed, mixed_labels), (pasted, pasted_labels) = results
    return (
        torch.where(first[:, None, None, None], mixed, pasted),
        torch.where(first[:, None], mixed_labels, pasted_labels),
    )


_QUANTILES = 4096


@cache
def _shares(alpha: float, device: torch.device) -> Tensor:
    from scipy.stats import beta  # slow to import, and seldom needed

    quantiles = (torch.arange(_QUANTILES) + 0.5) / _QUANTILES
    return torch.as_tensor(beta.ppf(quantiles.numpy(), alpha, alpha), dtype=torch.float32, device=device)


def _blend(labels: Tensor, share: Tensor) -> Tensor:
    return share[:, None] * labels + (1 - share[:, None]) * labels.roll(1, 0)


def _inside(size: int, centre: Tensor, side: Tensor) -> Tensor:
    pixels = (torch.arange(size, device=centre.device) + 0.5) / size
    return (pixels - centre).abs() < side / 2
