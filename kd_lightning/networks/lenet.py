"""A LeNet for digits."""

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import UserError


class LeNet(nn.Module):
    """Two 5x5 convolutions and two linear layers, without norms: small and fast, for grey digits.

    Y. LeCun et al.: Gradient-Based Learning Applied to Document Recognition, 1998, in the widths in use today

    Args:
        num_classes: Number of outputs, C.
        in_channels: Number of image channels.
        image_size: Height and width of the images; a multiple of 4.
        width: Width of the ``embedding``, the layer before the last.

    Raises:
        UserError: If the size is not a multiple of 4.

    Example:
        >>> import torch
        >>> LeNet(image_size=16)(torch.rand(2, 1, 16, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28, width: int = 128) -> None:
        super().__init__()
        if image_size < 4 or image_size % 4:
            raise UserError(f"image_size must be a multiple of 4, got {image_size}.")
        self.conv1 = nn.Conv2d(in_channels, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.embedding = nn.Sequential(nn.Linear(64 * (image_size // 4) ** 2, width), nn.ReLU())
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, C)`` of images ``(B, channels, H, W)``."""
        maps = F.max_pool2d(F.relu(self.conv1(images)), 2)
        maps = F.max_pool2d(F.relu(self.conv2(maps)), 2)
        logits: Tensor = self.fc(self.embedding(maps.flatten(1)))
        return logits
