"""A network for inference: plain images in, logits out."""

import copy

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.networks import DataConfig, data_config


class Inference(nn.Module):
    """A network that normalizes its input by itself.

    Args:
        network: A classifier; its ``data_config`` has the mean and standard deviation of its input.
        uint8: Take bytes from 0 to 255 in place of floats in [0, 1].
        dtype: Type in which a copy of the network computes; ``None`` for the network itself in its own type. Images
            are normalized, and logits returned, in float32.

    Raises:
        UserError: If the mean and standard deviation of the network's input are not known.

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
                "The mean and standard deviation of the network's input are not known; pass mean and std to "
                "from_checkpoint, or set network.data_config = DataConfig.of(mean, std, classes)."
            )
        self.network = network if dtype is None else copy.deepcopy(network).to(dtype)
        self.dtype = dtype
        self.known: DataConfig = known
        self.uint8 = uint8
        unit = 255.0 if uint8 else 1.0
        self.register_buffer("mean", torch.tensor(known.mean)[:, None, None] * unit)
        self.register_buffer("scale", 1 / (torch.tensor(known.std)[:, None, None] * unit))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, C)`` of images ``(B, channels, H, W)``."""
        normalized = (images.to(self.mean.dtype) - self.mean) * self.scale
        logits: Tensor = self.network(normalized if self.dtype is None else normalized.to(self.dtype))
        return logits if self.dtype is None else logits.float()

    def to_input(self, images: Tensor) -> Tensor:
        """Convert floats in [0, 1] to the form in which this takes images."""
        return (images * 255).round().to(torch.uint8) if self.uint8 else images
