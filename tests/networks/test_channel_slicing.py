"""Networks sliced to fewer channels."""

import pytest
import torch
from torch import nn

from kd_lightning.networks import ResNet
from kd_lightning.networks.channel_slicing import select, select_entries, slice_to, sliced_shapes, tensor_shapes


def test_a_network_is_sliced_to_the_widths_of_another() -> None:
    wide, small = ResNet([1, 1], [8, 16]), ResNet([1, 1], [4, 6])
    slice_to(wide, tensor_shapes(small))
    wide.load_state_dict(small.state_dict())
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(wide.eval()(images), small.eval()(images))
    convolution, norm = wide.get_submodule("layer1.0.conv1"), wide.get_submodule("layer1.0.bn1")
    assert convolution.out_channels == norm.num_features == 4
    assert wide.fc.in_features == 6
    assert sliced_shapes(wide) == tensor_shapes(small)


def test_depthwise_convolutions_keep_one_group_per_channel() -> None:
    wide = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    small = nn.Sequential(nn.Conv2d(5, 5, 3, groups=5), nn.Conv2d(5, 4, 1))
    slice_to(wide, tensor_shapes(small)).load_state_dict(small.state_dict())
    images = torch.rand(1, 5, 4, 4)
    torch.testing.assert_close(wide(images), small(images))


def test_select_keeps_the_chosen_entries_and_the_memory_format() -> None:
    layer = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    before = layer.weight.detach().clone()
    indices = torch.arange(before.numel()).view(before.shape)[[0, 3]]
    select(nn.Sequential(layer), {"0.weight": indices, "0.bias": torch.tensor([0, 3])})
    assert torch.equal(layer.weight, before[[0, 3]])
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(select_entries(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([2, 0])), torch.tensor([7.0, 5.0]))


@pytest.mark.parametrize("shape", [[9, 3, 3, 3], [0, 3, 3, 3], [4, 3, 3], "4333", [4.5, 3, 3, 3]])
def test_shapes_that_do_not_fit_are_refused(shape: object) -> None:
    with pytest.raises(ValueError, match=r"'conv1.weight' of ResNet has the shape \(8, 3, 3, 3\)"):
        slice_to(ResNet([1], [8]), {"conv1.weight": shape})  # type: ignore[dict-item]
