"""Wide residual networks."""

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import UserError


class WideResNet(nn.Module):
    """A wide residual network: batch norm and ReLU before each convolution.

    The three stages are named ``layer1`` to ``layer3``; ``relu`` gives the map that is pooled, ``avgpool`` the
    embedding.

    S. Zagoruyko, N. Komodakis: Wide Residual Networks, BMVC 2016, https://arxiv.org/abs/1605.07146

    Args:
        depth: Number of layers, ``6n + 4``.
        widen: Factor on the widths 16-32-64.
        num_classes: Number of columns of the logits, C.
        in_channels: Number of image channels.

    Shapes:
        Images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``.

    Raises:
        UserError: If the depth is not ``6n + 4``.

    Example:
        >>> import torch
        >>> WideResNet(depth=10, widen=1)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int, widen: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise UserError(f"The depth of a wide ResNet is 6n + 4 (10, 16, 22, 28, 40 ...), got {depth}.")
        blocks, width = (depth - 4) // 6, 16 * widen
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(16, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of the images."""
        maps = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        logits: Tensor = self.fc(self.avgpool(self.relu(self.bn1(maps))).flatten(1))
        return logits


class _Block(nn.Module):
    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        same = stride == 1 and in_width == width
        self.downsample = None if same else nn.Conv2d(in_width, width, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        active = F.relu(self.bn1(maps))
        shortcut = maps if self.downsample is None else self.downsample(active)
        output: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active)))) + shortcut
        return output


def _stage(in_width: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_Block(in_width, width, stride), *(_Block(width, width, 1) for _ in range(blocks - 1)))


def wrn_16_2(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """WRN-16-2, 0.69 M parameters; the arguments are those of :class:`WideResNet`.

    Example:
        >>> sum(weight.numel() for weight in wrn_16_2(num_classes=100).parameters())
        703284
    """
    return WideResNet(16, 2, num_classes, in_channels)


def wrn_40_1(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """WRN-40-1, 0.56 M parameters; the arguments are those of :class:`WideResNet`.

    Example:
        >>> sum(weight.numel() for weight in wrn_40_1(num_classes=100).parameters())
        569780
    """
    return WideResNet(40, 1, num_classes, in_channels)


def wrn_40_2(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """WRN-40-2, 2.2 M parameters; the arguments are those of :class:`WideResNet`.

    Example:
        >>> sum(weight.numel() for weight in wrn_40_2(num_classes=100).parameters())
        2255156
    """
    return WideResNet(40, 2, num_classes, in_channels)


def wrn_28_10(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """WRN-28-10, 36.5 M parameters; the arguments are those of :class:`WideResNet`.

    Example:
        >>> sum(weight.numel() for weight in wrn_28_10(num_classes=100).parameters())
        36536884
    """
    return WideResNet(28, 10, num_classes, in_channels)
