"""ShuffleNets for small images."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import UserError


class ShuffleNetV1(nn.Module):
    """ShuffleNet with a 1x1 stem that keeps the resolution; each of the three stages halves it.

    The stages are named ``layer1`` to ``layer3``, of which the last gives the map that is pooled; ``avgpool`` gives the
    embedding.

    X. Zhang et al.: ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices, CVPR 2018,
    https://arxiv.org/abs/1707.01083; for small images as in the CRD benchmark, https://github.com/HobbitLong/RepDistiller

    Args:
        widths: Number of channels of each stage.
        blocks: Number of blocks in each stage.
        groups: Groups of the 1x1 convolutions; divides the widths, and four times it the inner ones.
        num_classes: Number of columns of the logits, C.
        in_channels: Number of image channels.

    Shapes:
        Images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``.

    Raises:
        UserError: If ``widths`` and ``blocks`` do not have three entries.

    Example:
        >>> ShuffleNetV1(widths=[48, 96, 192], blocks=[1, 1, 1], groups=2)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        widths: Sequence[int] = (240, 480, 960),
        blocks: Sequence[int] = (4, 8, 4),
        groups: int = 3,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        _check_stages(widths, blocks)
        self.conv1 = nn.Conv2d(in_channels, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        before = [24, *widths]
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                _GroupedBlock(before[i], widths[i] - before[i], groups, halve=True),
                *(_GroupedBlock(widths[i], widths[i], groups, halve=False) for _ in range(1, blocks[i])),
            )
            for i in range(3)
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[2], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of the images."""
        maps = F.relu(self.bn1(self.conv1(images)))
        maps = self.layer3(self.layer2(self.layer1(maps)))
        logits: Tensor = self.fc(self.avgpool(maps).flatten(1))
        return logits


class _GroupedBlock(nn.Module):
    """Three convolutions beside the input, which is added, or pooled and put in front of the new channels."""

    def __init__(self, in_width: int, width: int, groups: int, *, halve: bool) -> None:
        super().__init__()
        inner = width // 4
        self.halve = halve
        self.groups = 1 if in_width == 24 else groups  # the stem has too few channels
        self.conv1 = nn.Conv2d(in_width, inner, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, 2 if halve else 1, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, width, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(width)

    def forward(self, maps: Tensor) -> Tensor:
        new = _shuffle(F.relu(self.bn1(self.conv1(maps))), self.groups)
        new = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(new)))))
        if self.halve:
            return F.relu(torch.cat([new, F.avg_pool2d(maps, 3, stride=2, padding=1)], dim=1))
        return F.relu(new + maps)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 with a 1x1 stem that keeps the resolution; each of the three stages halves it.

    The stages are named ``layer1`` to ``layer3``; ``relu`` gives the map that is pooled, ``avgpool`` the embedding.

    N. Ma et al.: ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, ECCV 2018,
    https://arxiv.org/abs/1807.11164; for small images as in the CRD benchmark, https://github.com/HobbitLong/RepDistiller

    Args:
        widths: Number of channels of each stage, even.
        blocks: Number of blocks in each stage.
        last_width: Number of channels before the pooling.
        num_classes: Number of columns of the logits, C.
        in_channels: Number of image channels.

    Shapes:
        Images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``.

    Raises:
        UserError: If ``widths`` and ``blocks`` do not have three entries.

    Example:
        >>> ShuffleNetV2(widths=[16, 32, 64], blocks=[1, 1, 1], last_width=64)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        widths: Sequence[int] = (116, 232, 464),
        blocks: Sequence[int] = (4, 8, 4),
        last_width: int = 1024,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        _check_stages(widths, blocks)
        self.conv1 = nn.Conv2d(in_channels, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        before = [24, *widths]
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                _HalvingBlock(before[i], widths[i]), *(_SplitBlock(widths[i] // 2) for _ in range(1, blocks[i]))
            )
            for i in range(3)
        )
        self.conv2 = nn.Conv2d(widths[2], last_width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last_width)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last_width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of the images."""
        maps = F.relu(self.bn1(self.conv1(images)))
        maps = self.layer3(self.layer2(self.layer1(maps)))
        maps = self.relu(self.bn2(self.conv2(maps)))
        logits: Tensor = self.fc(self.avgpool(maps).flatten(1))
        return logits


class _SplitBlock(nn.Module):
    """Half of the channels pass, the others are convolved; then both are shuffled."""

    def __init__(self, half: int) -> None:
        super().__init__()
        self.kept = half
        self.conv1, self.bn1 = nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half)

    def forward(self, maps: Tensor) -> Tensor:
        kept, new = maps[:, : self.kept], maps[:, self.kept :]
        new = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(new)))))
        new = F.relu(self.bn3(self.conv3(new)))
        return _shuffle(torch.cat([kept, new], dim=1), 2)


class _HalvingBlock(nn.Module):
    """Two branches at half the resolution, shuffled."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(in_width, in_width, 3, 2, padding=1, groups=in_width, bias=False)
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv2, self.bn2 = nn.Conv2d(in_width, half, 1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(in_width, half, 1, bias=False), nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5, self.bn5 = nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half)

    def forward(self, maps: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(maps)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(maps)))))
        right = F.relu(self.bn5(self.conv5(right)))
        return _shuffle(torch.cat([left, right], dim=1), 2)


def _check_stages(widths: Sequence[int], blocks: Sequence[int]) -> None:
    if len(widths) != 3 or len(blocks) != 3 or min(blocks) < 1:
        raise UserError(
            f"A ShuffleNet has three stages of at least one block, got widths={list(widths)} and blocks={list(blocks)}."
        )


def _shuffle(maps: Tensor, groups: int) -> Tensor:
    """Mix the channels of groups: the first of each, then the second of each, and so on."""
    shuffled: Tensor = maps.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
    return shuffled


def shufflenet_v1(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ShuffleNetV1 with 3 groups, 0.95 M parameters, as in the CRD benchmark; see :class:`ShuffleNetV1`.

    Example:
        >>> sum(weight.numel() for weight in shufflenet_v1(num_classes=100).parameters())
        949258
    """
    return ShuffleNetV1(num_classes=num_classes, in_channels=in_channels)


def shufflenet_v2(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ShuffleNetV2 of the usual width, 1.4 M parameters, as in the CRD benchmark; see :class:`ShuffleNetV2`.

    Example:
        >>> sum(weight.numel() for weight in shufflenet_v2(num_classes=100).parameters())
        1355528
    """
    return ShuffleNetV2(num_classes=num_classes, in_channels=in_channels)
