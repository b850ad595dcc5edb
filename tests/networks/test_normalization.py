import pytest
import torch
from torch import nn

from kd_lightning.networks import DataConfig
from kd_lightning.networks.normalization import ConvertNormalization, normalization_between

CIFAR = DataConfig.of([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
IMAGENET = DataConfig.of([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], ["cat", "dog"])


def normalize(pixels: torch.Tensor, statistics: DataConfig) -> torch.Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in statistics[:2])
    return (pixels - mean) / std


@pytest.mark.parametrize(("given", "expected"), [(CIFAR, IMAGENET), (IMAGENET, CIFAR)])
def test_conversion_equals_normalizing_the_pixels_directly(given: DataConfig, expected: DataConfig) -> None:
    pixels = torch.rand(4, 3, 5, 6, dtype=torch.float64)
    converted = normalization_between(given, expected)(normalize(pixels, given).float())
    torch.testing.assert_close(converted, normalize(pixels, expected).float(), rtol=1e-5, atol=2e-6)


def test_converting_back_gives_the_original_images() -> None:
    images = torch.randn(2, 3, 4, 4)
    back = ConvertNormalization(IMAGENET, CIFAR)(ConvertNormalization(CIFAR, IMAGENET)(images))
    torch.testing.assert_close(back, images, rtol=1e-5, atol=2e-6)


def test_images_of_one_channel_are_converted() -> None:
    convert = normalization_between(DataConfig.of([0.305], [0.376]), DataConfig.of([0.0], [1.0]))
    torch.testing.assert_close(convert(torch.zeros(1, 1, 2, 2)), torch.full((1, 1, 2, 2), 0.305))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (DataConfig(), IMAGENET),
        (CIFAR, DataConfig()),
        (DataConfig(), DataConfig()),
        (IMAGENET, IMAGENET._replace(classes=("dog",))),
    ],
)
def test_no_conversion_if_statistics_are_unknown_or_equal(given: DataConfig, expected: DataConfig) -> None:
    assert isinstance(normalization_between(given, expected), nn.Identity)


def test_equal_statistics_do_not_change_images() -> None:
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(ConvertNormalization(CIFAR, CIFAR)(images), images)


def test_a_different_mean_alone_is_converted() -> None:
    moved = DataConfig.of([0.5, 0.4822, 0.4465], CIFAR.std)
    assert isinstance(normalization_between(CIFAR, moved), ConvertNormalization)


def test_different_numbers_of_channels_are_refused() -> None:
    grey = DataConfig.of([0.5], [0.5])
    with pytest.raises(
        ValueError, match="expects statistics of 3 channels and the data have 1; give both for the same"
    ):
        normalization_between(grey, CIFAR)
    with pytest.raises(ValueError, match="expects statistics of 1 channels and the data have 3"):
        ConvertNormalization(CIFAR, grey)


def test_the_conversion_has_no_parameters_and_no_state() -> None:
    convert = ConvertNormalization(CIFAR, IMAGENET)
    assert convert.state_dict() == {}
    assert list(convert.parameters()) == []
    assert convert.scale.dtype == convert.shift.dtype == torch.float32


def test_the_gradient_is_scaled_by_the_ratio_of_stds() -> None:
    images = torch.randn(1, 3, 2, 2, requires_grad=True)
    ConvertNormalization(CIFAR, IMAGENET)(images).sum().backward()
    expected = torch.tensor(CIFAR.std) / torch.tensor(IMAGENET.std)
    torch.testing.assert_close(images.grad, expected[:, None, None].expand(1, 3, 2, 2))
