"""Sizes and channels against Pillow and torchvision."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as reference

from kd_lightning.data.shapes import check_size, reshape, resize, statistics, stored_with_channels, with_channels

PIXELS = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (9, 40)])
def test_resize_matches_pillow(size: tuple[int, int]) -> None:
    for image, ours in zip(PIXELS, reshape(PIXELS, size=size, channels=3), strict=True):
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
        theirs = torch.from_numpy(np.asarray(pillow).copy()).permute(2, 0, 1)
        assert ours.dtype == torch.uint8
        assert (ours.int() - theirs.int()).abs().max() <= 1
        assert (ours.float() - theirs.float()).mean().abs() < 0.1  # rounded, not truncated


def test_the_same_size_returns_the_same_tensor() -> None:
    assert reshape(PIXELS, size=(28, 28), channels=3) is PIXELS
    assert reshape(PIXELS, size=None, channels=3) is PIXELS
    images = torch.rand(2, 1, 8, 8)
    assert resize(images, size=(8, 8)) is images
    assert with_channels(images, channels=1) is images


def test_large_sets_are_resized_like_small_ones() -> None:
    many = torch.randint(0, 256, (5000, 1, 4, 4), dtype=torch.uint8)
    ours = reshape(many, size=(2, 2), channels=1)
    assert torch.equal(ours[[0, 4095, 4096, 4999]], reshape(many[[0, 4095, 4096, 4999]], size=(2, 2), channels=1))


def test_grey_is_repeated_and_rgb_converted_to_grey() -> None:
    grey = PIXELS[:, :1]
    assert torch.equal(reshape(grey, size=None, channels=3), grey.repeat(1, 3, 1, 1))
    expected = reference.rgb_to_grayscale(PIXELS).int()
    assert (reshape(PIXELS, size=None, channels=1).int() - expected).abs().max() <= 1
    assert reshape(PIXELS, size=(9, 9), channels=1).shape == (3, 1, 9, 9)


def test_statistics_match_the_converted_images() -> None:
    assert statistics((0.1, 0.2, 0.3), channels=3) == (0.1, 0.2, 0.3)
    assert statistics((0.1,), channels=3) == (0.1, 0.1, 0.1)
    images = PIXELS.float() / 255
    mean = statistics(images.mean((0, 2, 3)).tolist(), channels=1)
    assert mean == pytest.approx([with_channels(images, channels=1).mean().item()], abs=1e-6)


@pytest.mark.parametrize("size", [0, -4])
def test_sizes_below_one_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=rf"^size must be >= 1, or null for the images' own, got {size}\.$"):
        check_size(size)


def test_stored_colours_become_the_grey_of_pillow() -> None:
    ours = stored_with_channels(PIXELS, channels=1)
    theirs = [np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")) for image in PIXELS]
    assert torch.equal(ours, torch.from_numpy(np.stack(theirs))[:, None])
    assert stored_with_channels(PIXELS, channels=3) is PIXELS
    assert torch.equal(stored_with_channels(PIXELS[:, :1], channels=3), PIXELS[:, :1].repeat(1, 3, 1, 1))


@pytest.mark.parametrize(("given", "wanted"), [(3, 2), (3, 4), (1, 2), (4, 3), (2, 1)])
def test_other_numbers_of_channels_are_refused(given: int, wanted: int) -> None:
    with pytest.raises(ValueError, match=f"^Images of {given} channels cannot be turned into {wanted}, only colour"):
        with_channels(torch.rand(2, given, 4, 4), channels=wanted)
