import pytest
import torch

from kd_lightning.features import layer_shapes
from kd_lightning.networks import VGG, vgg8, vgg13


@pytest.mark.parametrize(("size", "sizes"), [(8, [8, 4, 2, 1, 1]), (32, [32, 16, 8, 4, 4]), (64, [64, 32, 16, 8, 4])])
def test_stages_halve_the_resolution(size: int, sizes: list[int]) -> None:
    shapes = layer_shapes(VGG([1, 1, 1, 1, 1]), torch.rand(2, 3, size, size))
    assert [shapes[f"layer{i + 1}"][2:] for i in range(5)] == [(side, side) for side in sizes]
    assert [shapes[f"layer{i + 1}"][1] for i in range(5)] == [64, 128, 256, 512, 512]
    assert shapes["avgpool"] == (2, 512, 1, 1)


@pytest.mark.parametrize("build", [vgg8, vgg13])
def test_builders_accept_num_classes_and_in_channels(build: type) -> None:
    with torch.device("meta"):
        assert build(num_classes=7, in_channels=1)(torch.empty(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("blocks", [[1, 1], [1, 1, 1, 1, 0]])
def test_other_numbers_of_stages_are_refused(blocks: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^A VGG network has five stages of at least one convolution, got blocks="):
        VGG(blocks)
