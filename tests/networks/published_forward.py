"""The networks of the CRD benchmark as published, written out as functions of named weights.

Running one draws its weights under the published names, in the published order, and gives the logits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights(dict[str, Tensor]):
    """A state dict that draws a layer's weights when the layer is first used."""

    def conv(
        self, name: str, x: Tensor, width: int, size: int, stride: int = 1, groups: int = 1, bias: bool = False
    ) -> Tensor:
        weight = torch.randn(width, x.shape[1] // groups, size, size)
        weight = self.setdefault(f"{name}.weight", weight * (2 / weight[0].numel()) ** 0.5)
        shift = self.setdefault(f"{name}.bias", torch.randn(width)) if bias else None
        return F.conv2d(x, weight, shift, stride, size // 2, groups=groups)

    def norm(self, name: str, x: Tensor) -> Tensor:
        width = x.shape[1]
        weight = self.setdefault(f"{name}.weight", 0.5 + torch.rand(width))
        bias = self.setdefault(f"{name}.bias", torch.randn(width) / 5)
        mean = self.setdefault(f"{name}.running_mean", torch.randn(width) / 5)
        variance = self.setdefault(f"{name}.running_var", 0.5 + torch.rand(width))
        self.setdefault(f"{name}.num_batches_tracked", torch.tensor(7))
        return F.batch_norm(x, mean, variance, weight, bias)

    def linear(self, name: str, x: Tensor, classes: int = 100) -> Tensor:
        weight = self.setdefault(f"{name}.weight", torch.randn(classes, x.shape[1]) / x.shape[1] ** 0.5)
        return F.linear(x, weight, self.setdefault(f"{name}.bias", torch.randn(classes)))


def vgg(w: Weights, x: Tensor, convolutions: int) -> Tensor:
    for block, width in enumerate((64, 128, 256, 512, 512)):
        for i in range(0, 3 * convolutions, 3):
            x = w.norm(f"block{block}.{i + 1}", w.conv(f"block{block}.{i}", x, width, 3, bias=True)).relu()
        if block < 3:
            x = F.max_pool2d(x, 2, 2)
    return w.linear("classifier", x.mean((2, 3)))


def wide_resnet(w: Weights, x: Tensor, depth: int, widen: int) -> Tensor:
    x = w.conv("conv1", x, 16, 3)
    for block in (1, 2, 3):
        width = 8 * 2**block * widen
        for i in range((depth - 4) // 6):
            name, stride = f"block{block}.layer.{i}", 2 if block > 1 and i == 0 else 1
            active = w.norm(f"{name}.bn1", x).relu()
            new = w.conv(f"{name}.conv1", active, width, 3, stride)
            new = w.conv(f"{name}.conv2", w.norm(f"{name}.bn2", new).relu(), width, 3)
            x = new + (x if x.shape[1] == width else w.conv(f"{name}.convShortcut", active, width, 1, stride))
    return w.linear("fc", w.norm("bn1", x).relu().mean((2, 3)))


def resnet18(w: Weights, x: Tensor) -> Tensor:
    x = w.norm("bn1", w.conv("conv1", x, 64, 3)).relu()
    for layer, width in enumerate((64, 128, 256, 512), 1):
        for i in range(2):
            name, stride = f"layer{layer}.{i}", 2 if layer > 1 and i == 0 else 1
            new = w.norm(f"{name}.bn1", w.conv(f"{name}.conv1", x, width, 3, stride)).relu()
            new = w.norm(f"{name}.bn2", w.conv(f"{name}.conv2", new, width, 3))
            if stride == 2:
                x = w.norm(f"{name}.shortcut.1", w.conv(f"{name}.shortcut.0", x, width, 1, stride))
            x = (new + x).relu()
    return w.linear("linear", x.mean((2, 3)))


def resnet50(w: Weights, x: Tensor) -> Tensor:
    x = w.norm("bn1", w.conv("conv1", x, 64, 3)).relu()
    for layer, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        for i in range(blocks):
            name, stride = f"layer{layer}.{i}", 2 if layer > 1 and i == 0 else 1
            new = w.norm(f"{name}.bn1", w.conv(f"{name}.conv1", x, width, 1)).relu()
            new = w.norm(f"{name}.bn2", w.conv(f"{name}.conv2", new, width, 3, stride)).relu()
            new = w.norm(f"{name}.bn3", w.conv(f"{name}.conv3", new, 4 * width, 1))
            if i == 0:
                x = w.norm(f"{name}.shortcut.1", w.conv(f"{name}.shortcut.0", x, 4 * width, 1, stride))
            x = (new + x).relu()
    return w.linear("linear", x.mean((2, 3)))


def mobilenet_v2_half(w: Weights, x: Tensor) -> Tensor:
    def conv_norm(name: str, x: Tensor, width: int, size: int, stride: int = 1, groups: int = 1) -> Tensor:
        head, _, index = name.rpartition(".")
        return w.norm(f"{head}.{int(index) + 1}", w.conv(name, x, width, size, stride, groups))

    x = conv_norm("conv1.0", x, 16, 3, 2).relu()
    settings = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1)]
    settings += [(6, 160, 3, 2), (6, 320, 1, 1)]
    for group, (expansion, width, blocks, first_stride) in enumerate(settings):
        for i in range(blocks):
            name, stride, inner = f"blocks.{group}.{i}.conv", 1 if i else first_stride, expansion * x.shape[1]
            new = conv_norm(f"{name}.0", x, inner, 1).relu()
            new = conv_norm(f"{name}.3", new, inner, 3, stride, inner).relu()
            new = conv_norm(f"{name}.6", new, width // 2, 1)
            x = x + new if stride == 1 and x.shape == new.shape else new
    return w.linear("classifier.0", conv_norm("conv2.0", x, 1280, 1).relu().mean((2, 3)))


def shuffled(x: Tensor, groups: int) -> Tensor:
    count, channels, height, width = x.shape
    grouped = x.view(count, groups, channels // groups, height, width)
    return grouped.permute(0, 2, 1, 3, 4).reshape(count, channels, height, width)


def shufflenet_v1(w: Weights, x: Tensor) -> Tensor:
    x = w.norm("bn1", w.conv("conv1", x, 24, 1)).relu()
    for layer, (planes, blocks) in enumerate(((240, 4), (480, 8), (960, 4)), 1):
        for i in range(blocks):
            name, width = f"layer{layer}.{i}", planes - (x.shape[1] if i == 0 else 0)
            groups = 1 if x.shape[1] == 24 else 3
            new = w.norm(f"{name}.bn1", w.conv(f"{name}.conv1", x, int(width / 4), 1, groups=groups)).relu()
            new = shuffled(new, groups)
            new = w.conv(f"{name}.conv2", new, int(width / 4), 3, 2 if i == 0 else 1, new.shape[1])
            new = w.conv(f"{name}.conv3", w.norm(f"{name}.bn2", new).relu(), width, 1, groups=3)
            new = w.norm(f"{name}.bn3", new)
            x = torch.cat([new, F.avg_pool2d(x, 3, 2, 1)], 1).relu() if i == 0 else (new + x).relu()
    return w.linear("linear", x.mean((2, 3)))


def shufflenet_v2(w: Weights, x: Tensor) -> Tensor:
    def step(name: str, number: int, x: Tensor, width: int, size: int = 1, stride: int = 1) -> Tensor:
        groups = width if size == 3 else 1
        return w.norm(f"{name}.bn{number}", w.conv(f"{name}.conv{number}", x, width, size, stride, groups))

    x = w.norm("bn1", w.conv("conv1", x, 24, 1)).relu()
    for layer, (width, blocks) in enumerate(((116, 3), (232, 7), (464, 3)), 1):
        name = f"layer{layer}.0"
        left = step(name, 2, step(name, 1, x, x.shape[1], 3, 2), width // 2).relu()
        right = step(name, 4, step(name, 3, x, width // 2).relu(), width // 2, 3, 2)
        x = shuffled(torch.cat([left, step(name, 5, right, width // 2).relu()], 1), 2)
        for i in range(1, blocks + 1):
            name, (kept, new) = f"layer{layer}.{i}", x.chunk(2, 1)
            new = step(name, 2, step(name, 1, new, width // 2).relu(), width // 2, 3)
            x = shuffled(torch.cat([kept, step(name, 3, new, width // 2).relu()], 1), 2)
    x = w.norm("bn2", w.conv("conv2", x, 1024, 1)).relu()
    return w.linear("linear", x.mean((2, 3)))


def resnet(w: Weights, x: Tensor, blocks: int, widths: tuple[int, int, int, int]) -> Tensor:
    x = w.norm("bn1", w.conv("conv1", x, widths[0], 3)).relu()
    for layer, width in enumerate(widths[1:], 1):
        for i in range(blocks):
            name, stride = f"layer{layer}.{i}", 2 if layer > 1 and i == 0 else 1
            new = w.norm(f"{name}.bn1", w.conv(f"{name}.conv1", x, width, 3, stride)).relu()
            new = w.norm(f"{name}.bn2", w.conv(f"{name}.conv2", new, width, 3))
            if stride != 1 or x.shape[1] != width:
                x = w.norm(f"{name}.downsample.1", w.conv(f"{name}.downsample.0", x, width, 1, stride))
            x = (new + x).relu()
    return w.linear("fc", x.mean((2, 3)))
