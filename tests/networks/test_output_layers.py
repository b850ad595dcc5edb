"""The layers that compute the logits are found by what they do."""

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.networks import replace_head, resnet20, resnet32x4, reuse_teacher_classifier
from kd_lightning.networks.output_layers import output_layers, output_weights


class HeadFirst(nn.Module):
    """Declares the head before the layers that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.conv = nn.Conv2d(3, 8, 3)
        self.inner = nn.Linear(8, 8)

    def features(self, images: Tensor) -> Tensor:
        """Return ``(B, 8)``."""
        return self.inner(self.conv(images).mean((2, 3)).relu())  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, 3)``."""
        return self.head(self.features(images))  # type: ignore[no-any-return]


class TwoHeads(HeadFirst):
    """Averages two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, 3)``."""
        features = self.features(images)
        return (self.head(features) + self.second(features)) / 2  # type: ignore[no-any-return]


class Cosine(HeadFirst):
    """Computes logits with a weight of its own, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(3, 8))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, 3)``."""
        return self.scale * nn.functional.linear(self.features(images), nn.functional.normalize(self.prototypes))


def _conv_head() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("build", "layers", "weights"),
    [
        (HeadFirst, ["head"], ["head.weight", "head.bias"]),
        (TwoHeads, ["head", "second"], ["head.weight", "head.bias", "second.weight", "second.bias"]),
        (Cosine, [""], ["prototypes", "scale"]),
        (_conv_head, ["1"], ["1.weight", "1.bias", "4.weight", "4.bias"]),
        (resnet20, ["fc"], ["fc.weight", "fc.bias"]),
        (lambda: resnet20().requires_grad_(False), ["fc"], ["fc.weight", "fc.bias"]),
        (lambda: reuse_teacher_classifier(resnet20(), resnet32x4()), ["fc"], ["fc.weight", "fc.bias"]),
        (torchvision.models.squeezenet1_1, ["classifier.1"], ["classifier.1.weight", "classifier.1.bias"]),
        (
            lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=1, embed_dim=12),
            ["head", "head_dist"],
            ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"],
        ),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(144, 2))
            ),
            ["2"],
            ["2.bias", "2.parametrizations.weight.original0", "2.parametrizations.weight.original1"],
        ),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), ["1"], ["1.weight", "1.bias"]),
    ],
)
def test_the_weights_of_the_logits(build: Callable[[], nn.Module], layers: list[str], weights: list[str]) -> None:
    network = build()
    trained = {name: weight.requires_grad for name, weight in network.named_parameters()}
    assert output_layers(network) == layers
    assert output_weights(network) == weights
    assert {name: weight.requires_grad for name, weight in network.named_parameters()} == trained
    assert all(weight.grad is None for weight in network.parameters())


@pytest.mark.parametrize("build", [HeadFirst, TwoHeads, torchvision.models.squeezenet1_1])
def test_a_new_head_is_where_the_logits_are_computed(build: Callable[[], nn.Module]) -> None:
    network = build()
    inner = [weight for name, weight in network.named_parameters() if name.startswith(("inner", "features"))]
    assert replace_head(network, 7)(torch.rand(2, 3, 64, 64)).shape == (2, 7)
    same = [weight for name, weight in network.named_parameters() if name.startswith(("inner", "features"))]
    assert all(old is new for old, new in zip(inner, same, strict=True))


def test_a_head_that_is_no_layer_cannot_be_replaced() -> None:
    with pytest.raises(
        UserError,
        match=r"logits of Cosine was not found; name it",
    ):
        replace_head(Cosine(), 7)
    with pytest.raises(UserError, match="TwoHeads does not have one linear layer that computes the logits"):
        reuse_teacher_classifier(resnet20(), TwoHeads())
