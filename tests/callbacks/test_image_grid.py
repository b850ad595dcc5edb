"""A grid shows each image and its class, at a size at which both can be read."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_lightning.callbacks.image_grid import image_grid, label_captions

CLASSES = ["cat", "dog", "bird"]


def pictures(count: int, height: int, width: int, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0))


def drawn(images: Tensor, captions: list[str]) -> np.ndarray:
    return np.asarray(image_grid(images, captions))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([2, -1, 0], ["bird", "unlabelled", "cat"]),
        ([3], ["3"]),
        ([[0.7, 0.3, 0.0]], ["cat 0.7\ndog 0.3"]),
        ([[0.0, 0.04, 0.96], [0.2, 0.5, 0.3]], ["bird", "dog 0.5\nbird 0.3"]),
        ([[0.02, 0.01, 0.015]], ["cat"]),
        ([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [-1.0, -1.0, -1.0]], ["dog", "unlabelled", "unlabelled"]),
    ],
)
def test_captions_name_the_classes(labels: list[object], expected: list[str]) -> None:
    assert label_captions(torch.tensor(labels), CLASSES) == expected


def test_a_name_is_one_line() -> None:
    assert label_captions(torch.tensor([0]), ["a  name\nof two lines"]) == ["a name of two lines"]


@pytest.mark.parametrize("side", [8, 28, 32, 64, 224, 518])
def test_small_images_are_enlarged_and_large_ones_reduced(side: int) -> None:
    height, width, _ = drawn(pictures(32, side, side), ["cat"] * 32).shape
    assert height * width < 1.05 * 2**20
    assert width / 8 > 100


@pytest.mark.parametrize(("count", "height", "width"), [(1, 8, 8), (3, 100, 30), (200, 32, 32), (3000, 224, 224)])
def test_any_number_of_images_of_any_shape_fits(count: int, height: int, width: int) -> None:
    shape = drawn(pictures(count, height, width), ["cat"] * count).shape
    assert shape[0] * shape[1] < 1.2 * 2**20


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_enlarged_images_are_those_of_the_images(channels: int) -> None:
    images = pictures(2, 32, 32, channels)
    grid = drawn(images, ["cat", "dog"])
    expected = (images * 255).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    for number, image in enumerate(expected.numpy()):
        cell = grid[3:131, 3 + number * 134 : 131 + number * 134]
        assert np.array_equal(cell[::4, ::4], image)
        assert np.array_equal(cell[3::4, 3::4], image)


def ink(grid: np.ndarray, number: int) -> np.ndarray:
    """Return the part of a grid of images of 32 pixels below one of the first row."""
    return np.asarray(grid[132:, 134 * number : 134 * (number + 1)]) < 128


def test_each_caption_is_below_its_image() -> None:
    images = torch.ones(3, 3, 32, 32)
    grid = drawn(images, ["cat", "", "dog 0.7\nbird 0.3"])
    assert ink(grid, 0).any()
    assert not ink(grid, 1).any()
    assert ink(grid, 2)[:15].any()
    assert ink(grid, 2)[15:].any()
    assert not ink(grid, 0)[15:].any()
    assert not np.array_equal(ink(grid, 0), ink(drawn(images, ["dog", "", "x\ny"]), 0))


def test_a_long_name_is_cut_to_the_width_of_its_image_and_its_share_is_kept() -> None:
    images, name = torch.ones(2, 3, 32, 32), "a name that is far too long for an image"
    grids = [drawn(images, [f"{name} {share}", ""]) for share in ("0.7", "0.3")]
    assert not ink(grids[0], 1).any()
    assert not ink(grids[0], 0)[:, [0, 1, 132, 133]].any()
    assert not np.array_equal(grids[0], grids[1])
    assert ink(drawn(images, [name.replace(" ", ""), ""]), 0).any()
