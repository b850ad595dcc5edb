"""MobileNetV2 for small images."""

from torch import Tensor, nn

from kd_lightning.errors import UserError

_STAGES = {
    "layer1": [(16, 1, 1), (24, 2, 1)],
    "layer2": [(32, 3, 2)],
    "layer3": [(64, 4, 2), (96, 3, 1)],
    "layer4": [(160, 3, 2), (320, 1, 1)],
}
"""Groups of equal blocks: width, number and stride of the first; the layers end where the CRD benchmark reads maps."""


class MobileNetV2(nn.Module):
    """MobileNetV2 with a stride of 16 in all, for small images.

    The blocks are in four layers, ``layer1`` to ``layer4``; ``conv2`` gives the map that is pooled, ``avgpool`` the
    embedding.

    M. Sandler et al.: MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018,
    https://arxiv.org/abs/1801.04381; for small images as in the CRD benchmark,
    https://github.com/HobbitLong/RepDistiller

    Args:
        width: Factor on the widths, > 0; 0.5 in the benchmark. The last layer stays at least 1280 wide.
        num_classes: Number of columns of the logits, C.
        in_channels: Number of image channels.

    Shapes:
        Images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``.

    Raises:
        UserError: If the width is not above 0.

    Example:
        >>> import torch
        >>> MobileNetV2(width=0.25)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, width: float = 1.0, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if not int(16 * width) >= 1:
            raise UserError(f"width must be at least 1/16, got {width}.")
        channels = int(32 * width)
        self.conv1 = _conv(in_channels, channels, size=3, stride=2)
        for name, groups in _STAGES.items():
            stage = nn.Sequential()
            for base, count, stride in groups:
                first = _InvertedResidual(channels, int(base * width), stride, expansion=1 if base == 16 else 6)
                channels = int(base * width)
                stage.append(nn.Sequential(first, *(_InvertedResidual(channels, channels, 1) for _ in range(1, count))))
            self.add_module(name, stage)
        last = max(1280, int(1280 * width))
        self.conv2 = _conv(channels, last, size=1, stride=1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as released, also where channels are grouped
                deviation = (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5
                nn.init.normal_(module.weight, std=deviation)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of the images."""
        maps = self.conv1(images)
        for name in _STAGES:
            maps = self.get_submodule(name)(maps)
        logits: Tensor = self.fc(self.avgpool(self.conv2(maps)).flatten(1))
        return logits


class _InvertedResidual(nn.Module):
    def __init__(self, in_width: int, width: int, stride: int, expansion: int = 6) -> None:
        super().__init__()
        inner = expansion * in_width
        self.conv = nn.Sequential(
            *_conv(in_width, inner, size=1, stride=1),
            *_conv(inner, inner, size=3, stride=stride, groups=inner),
            nn.Conv2d(inner, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.residual = stride == 1 and in_width == width

    def forward(self, maps: Tensor) -> Tensor:
        output: Tensor = self.conv(maps)
        return maps + output if self.residual else output


def _conv(in_width: int, width: int, *, size: int, stride: int, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_width, width, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


def mobilenet_v2_half(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """MobileNetV2 of half the width, 0.81 M parameters, as in the CRD benchmark; see :class:`MobileNetV2`.

    Example:
        >>> sum(weight.numel() for weight in mobilenet_v2_half(num_classes=100).parameters())
        812836
    """
    return MobileNetV2(0.5, num_classes, in_channels)
