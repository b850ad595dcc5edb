"""VGG networks for small images."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import UserError


class VGG(nn.Module):
    """A VGG network of five stages of 3x3 convolutions with batch norms, and one linear layer.

    The resolution is halved after each of the first three stages, and after the fourth for images of 64 pixels and
    above. The stages are named ``layer1`` to ``layer5``, of which the last gives the map that is pooled; ``avgpool``
    gives the embedding.

    K. Simonyan, A. Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015,
    https://arxiv.org/abs/1409.1556; for small images as in the CRD benchmark, https://github.com/HobbitLong/RepDistiller

    Args:
        blocks: Number of convolutions in each of the five stages.
        num_classes: Number of columns of the logits, C.
        in_channels: Number of image channels.

    Shapes:
        Images ``(B, in_channels, H, W)`` of at least 8 pixels to logits ``(B, num_classes)``.

    Raises:
        UserError: If there are not five stages.

    Example:
        >>> import torch
        >>> VGG(blocks=[1, 1, 1, 1, 1])(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, blocks: Sequence[int], num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        widths = (64, 128, 256, 512, 512)
        if len(blocks) != len(widths) or min(blocks) < 1:
            raise UserError(f"A VGG network has five stages of at least one convolution, got blocks={list(blocks)}.")
        self.stages = [f"layer{i + 1}" for i in range(len(widths))]
        for stage, width, count in zip(self.stages, widths, blocks, strict=True):
            self.add_module(stage, _stage(in_channels, width, count))
            in_channels = width
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # each has one
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of the images."""
        maps = images
        for i, stage in enumerate(self.stages):
            maps = self.get_submodule(stage)(maps)
            if i < 3 or (i == 3 and images.shape[2] >= 64):
                maps = F.max_pool2d(maps, 2)
        logits: Tensor = self.fc(self.avgpool(maps).flatten(1))
        return logits


def _stage(in_width: int, width: int, count: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(count):
        layers += [nn.Conv2d(width if i else in_width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


def vgg8(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """VGG-8 for small images, 3.9 M parameters; the arguments are those of :class:`VGG`.

    Example:
        >>> sum(weight.numel() for weight in vgg8(num_classes=100).parameters())
        3965028
    """
    return VGG([1, 1, 1, 1, 1], num_classes, in_channels)


def vgg13(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """VGG-13 for small images, 9.4 M parameters; the arguments are those of :class:`VGG`.

    Example:
        >>> sum(weight.numel() for weight in vgg13(num_classes=100).parameters())
        9462180
    """
    return VGG([2, 2, 2, 2, 2], num_classes, in_channels)
