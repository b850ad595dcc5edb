from typing import Any

import pytest
import torch

from kd_lightning.features import layer_shapes
from kd_lightning.networks import ShuffleNetV1, ShuffleNetV2, shufflenet_v1, shufflenet_v2

SMALL: dict[type, dict[str, Any]] = {
    ShuffleNetV1: {"widths": [48, 96, 192], "blocks": [2, 1, 1]},
    ShuffleNetV2: {"widths": [48, 96, 192], "blocks": [2, 1, 1], "last_width": 64},
}


@pytest.mark.parametrize(("build", "widths"), [(shufflenet_v1, [240, 480, 960]), (shufflenet_v2, [116, 232, 464])])
def test_each_stage_halves_the_resolution(build: Any, widths: list[int]) -> None:
    shapes = layer_shapes(build(), torch.rand(2, 3, 32, 32))
    assert [shapes[f"layer{i + 1}"][1:] for i in range(3)] == [
        (width, size, size) for width, size in zip(widths, (16, 8, 4), strict=True)
    ]
    assert shapes["fc"] == (2, 10)


@pytest.mark.parametrize("kind", SMALL)
def test_channels_last_trains_to_the_same_gradients(kind: Any) -> None:
    network, images = kind(num_classes=7, in_channels=1, **SMALL[kind]), torch.randn(4, 1, 16, 16)
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        network.zero_grad()
        network.to(memory_format=memory_format)
        network(images.to(memory_format=memory_format)).square().sum().backward()
        gradients.append([weight.grad.clone() for weight in network.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-4 * float(first.abs().max()) + 1e-5)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("options", [{"widths": [24, 48]}, {"blocks": [1, 1]}, {"blocks": [1, 0, 1]}])
def test_other_numbers_of_stages_are_refused(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^A ShuffleNet has three stages of at least one block, got widths=\["):
        kind(**options)
