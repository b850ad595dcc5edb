"""LeNet: its number of parameters, its embedding, and the image sizes that it refuses."""

import pytest
import torch

from kd_lightning.features import FeatureTap
from kd_lightning.networks import LeNet


def test_the_number_of_parameters() -> None:
    convolutions = 32 * (25 + 1) + 64 * (32 * 25 + 1)
    assert sum(weight.numel() for weight in LeNet().parameters()) == convolutions + 128 * (3136 + 1) + 10 * 129


def test_the_embedding_is_the_input_of_the_classifier() -> None:
    network = LeNet(num_classes=7, in_channels=3, image_size=16, width=20)
    logits, features = FeatureTap(network, ["embedding"])(torch.rand(2, 3, 16, 16))
    torch.testing.assert_close(network.fc(features["embedding"]), logits)
    assert logits.shape == (2, 7)
    assert features["embedding"].min() >= 0


@pytest.mark.parametrize("size", [0, 30])
def test_sizes_that_are_not_a_multiple_of_4_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        LeNet(image_size=size)
