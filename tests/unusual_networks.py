"""Small classifiers for grey 8x8 images, with habits of users' networks that this package's own do not have."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.googlenet import GoogLeNetOutputs


class HeadFirst(nn.Module):
    """Declares the head before the layers that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 10)
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.inner = nn.Linear(16, 16)

    def features(self, images: Tensor) -> Tensor:
        """Return ``(B, 16)``."""
        maps = self.second(self.first(images).relu()).relu()
        return self.inner(maps.mean((2, 3))).relu()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, 10)``."""
        return self.head(self.features(images))


class TwoHeads(HeadFirst):
    """Averages the logits of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.second_head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, 10)``."""
        features = self.features(images)
        return (self.head(features) + self.second_head(features)) / 2


class ConvHead(nn.Module):
    """Classifies each position by a 1x1 convolution, and averages."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.classifier = nn.Conv2d(16, 10, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, 10)``."""
        maps: Tensor = self.classifier(self.second(self.first(images).relu()).relu())
        return maps.mean((2, 3))


class SharedWeights(HeadFirst):
    """Uses one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Conv2d(16, 16, 3, padding=1)
        self.third.weight = self.second.weight

    def features(self, images: Tensor) -> Tensor:
        """Return ``(B, 16)``."""
        maps = self.third(self.second(self.first(images).relu()).relu()).relu()
        return self.inner(maps.mean((2, 3))).relu()


class SharedLayer(HeadFirst):
    """Uses one layer twice."""

    def features(self, images: Tensor) -> Tensor:
        """Return ``(B, 16)``."""
        maps = self.second(self.second(self.first(images).relu()).relu()).relu()
        return self.inner(maps.mean((2, 3))).relu()


class Viewing(nn.Module):
    """The tutorials' network, which flattens its maps by ``view``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, 10)``."""
        maps = functional.max_pool2d(self.norm(self.conv(images)).relu(), 2)
        return self.fc(maps.view(maps.size(0), -1))


class Probabilities(Viewing):
    """Ends in a softmax."""

    def forward(self, images: Tensor) -> Tensor:
        """Return probabilities ``(B, 10)``."""
        return super().forward(images).softmax(1)


class Counting(Viewing):
    """Counts its forward passes in buffers, in eval mode too: one changed in place, one replaced."""

    calls: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("total", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, 10)``."""
        self.calls += 1
        self.total = self.total + len(images)
        return super().forward(images)


class Complex(Viewing):
    """Has a complex weight."""

    def __init__(self) -> None:
        super().__init__()
        self.waves = nn.Parameter(torch.randn(96, 10, dtype=torch.complex64))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, 10)``."""
        maps = functional.max_pool2d(self.norm(self.conv(images)).relu(), 2).flatten(1)
        return (maps.to(torch.complex64) @ self.waves).abs()


class WithAuxiliary(Viewing):
    """Returns what torchvision's GoogLeNet does: in train mode further logits beside the main ones."""

    aux_logits = True

    def forward(self, images: Tensor) -> "Tensor | GoogLeNetOutputs":
        """Return logits ``(B, 10)``, in train mode as the first field of a named tuple."""
        logits = super().forward(images)
        return GoogLeNetOutputs(logits, logits, logits) if self.training else logits


class WithDropout(nn.Module):
    """Drops half of its features in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop, self.fc = nn.Conv2d(1, 8, 3), nn.Dropout(0.5), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, 10)``."""
        return self.fc(self.drop(self.body(images).relu().mean((2, 3))))


def with_group_norms(network: nn.Module) -> nn.Module:
    """Replace the batch norms, so that the outputs of an image do not depend on the batch."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(1, child.num_features))
    return network


class Pair(Viewing):
    """Returns two outputs."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return logits ``(B, 10)``, twice."""
        logits = super().forward(images)
        return logits, logits
