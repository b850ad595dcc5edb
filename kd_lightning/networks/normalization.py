"""Conversion between input statistics."""

from typing import cast

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.networks.data_config import DataConfig


class ConvertNormalization(nn.Module):
    """Converts images that were normalized with one mean and deviation to another.

    Args:
        given: Statistics that the images were normalized with.
        expected: Statistics that the network was trained with.

    Raises:
        UserError: If the numbers of channels differ.

    Example:
        >>> convert = ConvertNormalization(given=DataConfig.of([0.5], [0.5]), expected=DataConfig.of([0.0], [1.0]))
        >>> convert(torch.ones(1, 1, 1, 1)).item()
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
        """Return converted images ``(B, channels, H, W)``."""
        return (images * self.scale + self.shift).to(images.dtype)


def normalization_between(given: DataConfig, expected: DataConfig) -> nn.Module:
    """Return a :class:`ConvertNormalization` if both statistics are known and differ, else an identity."""
    if given.mean is None or expected.mean is None or given[:2] == expected[:2]:
        return nn.Identity()
    return ConvertNormalization(given, expected)
