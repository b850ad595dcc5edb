"""Residual networks for small images."""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import UserError

Shortcut = Literal["A", "B"]


class ResNet(nn.Module):
    """A residual network behind a 3x3 stem that keeps the resolution.

    Each stage after the first halves the resolution. Sub-modules are named as in torchvision: the stages ``layer1``,
    ``layer2`` and so on, of which the last gives the map that is pooled; ``avgpool`` gives the embedding.

    K. He et al.: Deep Residual Learning for Image Recognition, CVPR 2016, https://arxiv.org/abs/1512.03385

    Args:
        blocks: Number of blocks in each stage.
        widths: Number of channels of each stage.
        num_classes: Number of columns of the logits, C.
        shortcut: Kind of shortcut where the shape changes: ``"A"`` takes every second pixel and pads with zeros (no
            parameters, the paper's choice for CIFAR-10), ``"B"`` is a 1x1 convolution and a batch norm.
        in_channels: Number of image channels.
        stem_width: Number of channels of the stem; by default that of the first stage.
        bottleneck: Blocks of three convolutions, of which the first two have a quarter of the channels, in place of
            two.

    Shapes:
        Images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``.

    Raises:
        UserError: If ``blocks`` and ``widths`` differ in length, or the shortcut is unknown.

    Example:
        >>> import torch
        >>> ResNet(blocks=[1, 1], widths=[8, 16], in_channels=1)(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        num_classes: int = 10,
        shortcut: Shortcut = "B",
        in_channels: int = 3,
        stem_width: int | None = None,
        bottleneck: bool = False,
    ) -> None:
        super().__init__()
        if len(blocks) != len(widths) or not blocks:
            raise UserError(f"Give one width for each stage, got blocks={list(blocks)} and widths={list(widths)}.")
        if shortcut not in ("A", "B"):
            raise UserError(f"shortcut must be 'A' or 'B', got {shortcut!r}.")
        width = stem_width or widths[0]
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        for i, stage in enumerate(self.stages):
            self.add_module(stage, _stage(width, widths[i], blocks[i], 1 if i == 0 else 2, shortcut, bottleneck))
            width = widths[i]
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of the images."""
        maps = F.relu(self.bn1(self.conv1(images)))
        for stage in self.stages:
            maps = self.get_submodule(stage)(maps)
        logits: Tensor = self.fc(self.avgpool(maps).flatten(1))
        return logits


class _Block(nn.Module):
    def __init__(self, in_width: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _downsample(in_width, width, stride, shortcut)

    def forward(self, maps: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(maps)))
        residual = self.bn2(self.conv2(residual))
        return F.relu(residual + self.downsample(maps))


class _Bottleneck(nn.Module):
    def __init__(self, in_width: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        inner = width // 4
        self.conv1 = nn.Conv2d(in_width, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.downsample = _downsample(in_width, width, stride, shortcut)

    def forward(self, maps: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(maps)))
        residual = F.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        return F.relu(residual + self.downsample(maps))


class _PadChannels(nn.Module):
    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.front, self.back, self.stride = extra // 2, extra - extra // 2, stride

    def forward(self, maps: Tensor) -> Tensor:
        return F.pad(maps[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.front, self.back))


def _downsample(in_width: int, width: int, stride: int, shortcut: Shortcut) -> nn.Module:
    if stride == 1 and in_width == width:
        return nn.Identity()
    if shortcut == "A" and width >= in_width:
        return _PadChannels(width - in_width, stride)
    return nn.Sequential(nn.Conv2d(in_width, width, 1, stride, bias=False), nn.BatchNorm2d(width))


def _stage(in_width: int, width: int, blocks: int, stride: int, shortcut: Shortcut, bottleneck: bool) -> nn.Sequential:
    kind = _Bottleneck if bottleneck else _Block
    first = kind(in_width, width, stride, shortcut)
    return nn.Sequential(first, *(kind(width, width, 1, shortcut) for _ in range(blocks - 1)))


def _cifar(depth: int, num_classes: int, shortcut: Shortcut, in_channels: int) -> ResNet:
    return ResNet([(depth - 2) // 6] * 3, [16, 32, 64], num_classes, shortcut, in_channels)


def resnet20(num_classes: int = 10, shortcut: Shortcut = "B", in_channels: int = 3) -> nn.Module:
    """ResNet-20 for 32x32 images: 16-32-64 channels, 0.27 M parameters; the arguments are those of :class:`ResNet`.

    Example:
        >>> sum(weight.numel() for weight in resnet20(shortcut="A").parameters())
        269722
    """
    return _cifar(20, num_classes, shortcut, in_channels)


def resnet32(num_classes: int = 10, shortcut: Shortcut = "B", in_channels: int = 3) -> nn.Module:
    """ResNet-32 for 32x32 images: 16-32-64 channels, 0.46 M parameters; the arguments are those of :class:`ResNet`.

    Example:
        >>> sum(weight.numel() for weight in resnet32().parameters())
        466906
    """
    return _cifar(32, num_classes, shortcut, in_channels)


def resnet44(num_classes: int = 10, shortcut: Shortcut = "B", in_channels: int = 3) -> nn.Module:
    """ResNet-44 for 32x32 images: 16-32-64 channels, 0.66 M parameters; the arguments are those of :class:`ResNet`.

    Example:
        >>> sum(weight.numel() for weight in resnet44().parameters())
        661338
    """
    return _cifar(44, num_classes, shortcut, in_channels)


def resnet56(num_classes: int = 10, shortcut: Shortcut = "B", in_channels: int = 3) -> nn.Module:
    """ResNet-56 for 32x32 images: 16-32-64 channels, 0.85 M parameters; the arguments are those of :class:`ResNet`.

    Example:
        >>> sum(weight.numel() for weight in resnet56().parameters())
        855770
    """
    return _cifar(56, num_classes, shortcut, in_channels)


def resnet110(num_classes: int = 10, shortcut: Shortcut = "B", in_channels: int = 3) -> nn.Module:
    """ResNet-110 for 32x32 images: 16-32-64 channels, 1.7 M parameters; the arguments are those of :class:`ResNet`.

    Example:
        >>> sum(weight.numel() for weight in resnet110().parameters())
        1730714
    """
    return _cifar(110, num_classes, shortcut, in_channels)


def resnet8x4(num_classes: int = 10, shortcut: Shortcut = "B", in_channels: int = 3) -> nn.Module:
    """ResNet-8, four times as wide (stem 32, then 64-128-256), 1.2 M parameters, as in the CRD benchmark.

    Y. Tian et al.: Contrastive Representation Distillation, ICLR 2020, https://arxiv.org/abs/1910.10699

    Example:
        >>> sum(weight.numel() for weight in resnet8x4(num_classes=100).parameters())
        1233540
    """
    return ResNet([1] * 3, [64, 128, 256], num_classes, shortcut, in_channels, stem_width=32)


def resnet32x4(num_classes: int = 10, shortcut: Shortcut = "B", in_channels: int = 3) -> nn.Module:
    """ResNet-32, four times as wide (stem 32, then 64-128-256), 7.4 M parameters; see :func:`resnet8x4`.

    Example:
        >>> sum(weight.numel() for weight in resnet32x4(num_classes=100).parameters())
        7433860
    """
    return ResNet([5] * 3, [64, 128, 256], num_classes, shortcut, in_channels, stem_width=32)


def resnet18(num_classes: int = 10, shortcut: Shortcut = "B", in_channels: int = 3) -> nn.Module:
    """ResNet-18 with a 3x3 stem for 32x32 images: 64-128-256-512 channels, 11.2 M parameters.

    Example:
        >>> sum(weight.numel() for weight in resnet18().parameters())
        11173962
    """
    return ResNet([2, 2, 2, 2], [64, 128, 256, 512], num_classes, shortcut, in_channels)


def resnet34(num_classes: int = 10, shortcut: Shortcut = "B", in_channels: int = 3) -> nn.Module:
    """ResNet-34 with a 3x3 stem for 32x32 images: 64-128-256-512 channels, 21.3 M parameters.

    Example:
        >>> sum(weight.numel() for weight in resnet34().parameters())
        21282122
    """
    return ResNet([3, 4, 6, 3], [64, 128, 256, 512], num_classes, shortcut, in_channels)


def resnet50(num_classes: int = 10, shortcut: Shortcut = "B", in_channels: int = 3) -> nn.Module:
    """ResNet-50 with a 3x3 stem for 32x32 images: 256-512-1024-2048 channels, 23.5 M parameters.

    Example:
        >>> sum(weight.numel() for weight in resnet50(num_classes=100).parameters())
        23705252
    """
    widths = [256, 512, 1024, 2048]
    return ResNet([3, 4, 6, 3], widths, num_classes, shortcut, in_channels, stem_width=64, bottleneck=True)
