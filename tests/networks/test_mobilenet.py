import pytest
import torch

from kd_lightning.features import layer_shapes
from kd_lightning.networks import MobileNetV2, mobilenet_v2_half


def test_layers_end_where_the_benchmark_reads_maps() -> None:
    shapes = layer_shapes(mobilenet_v2_half(), torch.rand(2, 3, 32, 32))
    names = ["conv1", "layer1", "layer2", "layer3", "layer4", "conv2"]
    assert [shapes[name][1] for name in names] == [16, 12, 16, 48, 160, 1280]
    assert [shapes[name][2] for name in names] == [16, 16, 8, 4, 2, 2]


def test_widths_scale_and_channels_last_trains() -> None:
    assert layer_shapes(MobileNetV2(1.5), torch.rand(2, 3, 32, 32))["conv2"][1] == 1920
    network = MobileNetV2(0.25, num_classes=7, in_channels=1).to(memory_format=torch.channels_last)
    logits = network(torch.rand(4, 1, 32, 32).to(memory_format=torch.channels_last))
    assert logits.shape == (4, 7)
    logits.sum().backward()
    assert all(weight.grad is not None for weight in network.parameters())


def test_a_width_of_no_channel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^width must be at least 1/16, got 0\.01\.$"):
        MobileNetV2(0.01)
