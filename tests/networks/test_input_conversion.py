import torch
from torch import nn
from unusual_networks import Viewing

from kd_lightning.networks import DataConfig, set_data_config
from kd_lightning.networks.input_conversion import InputConversion

GIVEN, EXPECTED = DataConfig.of([0.5], [0.25]), DataConfig.of([0.1], [0.5])


def test_images_get_the_statistics_that_the_network_expects() -> None:
    network, convert_input = nn.Conv2d(1, 2, 1), InputConversion()
    set_data_config(network, EXPECTED)
    pixels = torch.rand(4, 1, 5, 6)
    images = (pixels - 0.5) / 0.25
    assert torch.equal(convert_input(images), images)
    convert_input.match(network, GIVEN)
    torch.testing.assert_close(convert_input(images), (pixels - 0.1) / 0.5)
    assert torch.equal(convert_input.in_memory_format(images), images)
    convert_input.match(network, EXPECTED)
    assert torch.equal(convert_input(images), images)


def test_only_a_network_that_cannot_run_in_channels_last_gets_contiguous_images() -> None:
    images = torch.rand(4, 1, 8, 8).to(memory_format=torch.channels_last)
    for network, fits in ((Viewing().eval(), False), (nn.Conv2d(1, 2, 3), True)):
        convert_input = InputConversion()
        convert_input.choose_memory_format(network, lambda network=network: network(images))  # type: ignore[misc]
        assert convert_input.channels_last is fits
        assert convert_input(images).stride() == (images if fits else images.flatten().view(images.shape)).stride()


def test_nothing_of_it_is_saved() -> None:
    network, convert_input = nn.Conv2d(1, 2, 1), InputConversion()
    set_data_config(network, EXPECTED)
    convert_input.match(network, GIVEN)
    assert not convert_input.state_dict()
