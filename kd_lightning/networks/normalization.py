"""Input statistics: what a network expects against what it gets."""

from typing import cast

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.networks.data_config import DataConfig


class ConvertNormalization(nn.Module):
    """Turns images that were normalised with one mean and deviation into images normalised with another.

    Args:
        given: What the images were normalised with.
        expected: What the network was trained with.

    Raises:
        ValueError: If the numbers of channels differ.

    Example:
        >>> turn = ConvertNormalization(given=DataConfig.of([0.5], [0.5]), expected=DataConfig.of([0.0], [1.0]))
        >>> turn(torch.ones(1, 1, 1, 1)).item()
        1.0
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, given: DataConfig, expected: DataConfig) -> None:
        super().__init__()
        mean, std, wanted_mean, wanted_std = (
            torch.tensor(cast("tuple[float, ...]", values), dtype=torch.float64)[:, None, None]
            for values in (given.mean, given.std, expected.mean, expected.std)
        )
        if mean.shape != wanted_mean.shape:
            raise UserError(
                f"The network expects statistics of {len(wanted_mean)} channels and the data have {len(mean)}; "
                "give both for the same number of channels."
            )
        self.register_buffer("scale", (std / wanted_std).float(), persistent=False)
        self.register_buffer("shift", ((mean - wanted_mean) / wanted_std).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, channels, H, W)``."""
        return (images * self.scale + self.shift).to(images.dtype)


def normalization_between(given: DataConfig, expected: DataConfig) -> nn.Module:
    """A :class:`ConvertNormalization` where both sides are known and differ, else nothing to do."""
    if given.mean is None or expected.mean is None or given[:2] == expected[:2]:
        return nn.Identity()
    return ConvertNormalization(given, expected)
