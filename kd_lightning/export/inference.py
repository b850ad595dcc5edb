"""A network as its users see it: plain images in, logits out."""

import copy

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.networks import DataConfig, data_config


class Inference(nn.Module):
    """A network with the normalisation of its input inside.

    Args:
        network: A classifier; what it was trained on (``data_config``) says how its input is normalised.
        uint8: Whether images are bytes from 0 to 255 and not floats in [0, 1].
        dtype: In which a copy of the network computes, where it is not the network itself in its own type; images are
            normalised, and logits given, in float32.

    Raises:
        ValueError: If it is not known how the network's input is normalised.

    Example:
        >>> from kd_lightning.networks import resnet20
        >>> network = resnet20()
        >>> network.data_config = DataConfig.of([0.5] * 3, [0.25] * 3)
        >>> Inference(network)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, uint8: bool = False, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        known = data_config(network)
        if known.mean is None or known.std is None:
            raise UserError(
                "It is not known how the network's input is normalised; pass mean and std to from_checkpoint, or set "
                "network.data_config = DataConfig.of(mean, std, classes)."
            )
        self.network = network if dtype is None else copy.deepcopy(network).to(dtype)
        self.dtype = dtype
        self.known: DataConfig = known
        self.uint8 = uint8
        unit = 255.0 if uint8 else 1.0
        self.register_buffer("mean", torch.tensor(known.mean)[:, None, None] * unit)
        self.register_buffer("scale", 1 / (torch.tensor(known.std)[:, None, None] * unit))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)`` of images ``(B, channels, H, W)``."""
        normalised = (images.to(self.mean.dtype) - self.mean) * self.scale
        return self.network(normalised) if self.dtype is None else self.network(normalised.to(self.dtype)).float()

    def taken(self, images: Tensor) -> Tensor:
        """Floats in [0, 1] in the form in which this takes images."""
        return (images * 255).round().to(torch.uint8) if self.uint8 else images
