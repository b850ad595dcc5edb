"""Crops and flips of a batch against a loop over its images, and the random draws behind them."""

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning.data.augmentation.crops import (
    Crops,
    draw_crops,
    gather_crops,
    normalize,
    pack,
    random_bits,
    uniform,
    unpack,
)

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def crop_reference(image: Tensor, top: int, left: int, mirrored: int, padding: int) -> Tensor:
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=torch.uint8)
    padded[:, padding : padding + height, padding : padding + width] = image
    view = padded[:, top : top + height, left : left + width]
    return view.flip([axis for bit, axis in ((1, 2), (2, 1)) if mirrored & bit])


@few
@given(st.data())
def test_crops_match_a_loop_over_images_exactly(data: st.DataObject) -> None:
    count, rows_wanted = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 7))
    channels, height, width = (data.draw(st.integers(1, top)) for top in (4, 9, 9))
    padding = data.draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    images = torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)
    rows = torch.randint(0, count, (rows_wanted,), generator=generator)
    crops = Crops(
        torch.randint(0, 2 * padding + 1, (rows_wanted,), generator=generator),
        torch.randint(0, 2 * padding + 1, (rows_wanted,), generator=generator),
        torch.randint(0, 4, (rows_wanted,), generator=generator, dtype=torch.int32),
    )
    views = unpack(gather_crops(pack(images, padding=padding), rows, crops, padding=padding), channels=channels).to(
        torch.uint8
    )
    expected = [
        crop_reference(images[row], top, left, mirrored, padding)
        for row, top, left, mirrored in zip(rows.tolist(), *(values.tolist() for values in crops), strict=True)
    ]
    assert views.dtype == torch.uint8
    assert torch.equal(views, torch.stack(expected))


@few
@given(padding=st.integers(0, 4), seed=st.integers(-(2**40), 2**40), flip=st.booleans())
def test_epoch_minus_one_gives_the_unchanged_image(padding: int, seed: int, flip: bool) -> None:
    images = torch.randint(0, 256, (3, 2, 5, 6), dtype=torch.uint8)
    crops = draw_crops(torch.arange(3), seed=seed, epoch=-1, padding=padding, flip=flip)
    assert torch.equal(
        unpack(gather_crops(pack(images, padding=padding), torch.arange(3), crops, padding=padding), channels=2),
        images.int(),
    )


@pytest.mark.parametrize("images", [torch.rand(2, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)])
def test_pack_refuses_images_that_are_not_uint8_batches(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^Images are stored as uint8 \(N, 1 to 4, H, W\), got torch\.\w+ \("):
        pack(images, padding=1)


@pytest.mark.parametrize("channels", [0, 5])
def test_pack_refuses_fewer_than_one_or_more_than_four_channels(channels: int) -> None:
    with pytest.raises(ValueError, match=rf"got torch\.uint8 \(2, {channels}, 4, 4\)\.$"):
        pack(torch.zeros(2, channels, 4, 4, dtype=torch.uint8), padding=1)


def test_seeds_of_more_than_64_bits_count_by_their_last_64() -> None:
    samples = torch.arange(5)
    for seed in (2**63, 2**64 - 1, -(2**63) - 1, 2**70 + 12):
        last = seed % 2**64
        same = last - 2**64 * (last >= 2**63)
        assert torch.equal(random_bits(samples, seed=seed, epoch=0), random_bits(samples, seed=same, epoch=0))


def test_random_bits_match_splitmix64() -> None:
    """The finalizer in Python integers, with the constants of the paper's reference code."""

    def finalize(bits: int) -> int:
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
        return bits ^ bits >> 31

    for seed, epoch, stream in [(0, 0, 0), (-1, 7, 3), (2**63 - 1, 10**6, 1), (-(2**62), 0, 4)]:
        samples = [0, 1, 49_999, 2**40]
        expected = []
        for sample in samples:
            state = 0
            for key in (seed, epoch, stream, sample):
                state = finalize((state + key + 0x9E3779B97F4A7C15) % 2**64)
            expected.append(state >> 16)
        assert random_bits(torch.tensor(samples), seed=seed, epoch=epoch, stream=stream).tolist() == expected


@few
@given(seed=st.integers(-(2**62), 2**62), epoch=st.integers(0, 10**6), order=st.permutations(range(12)))
def test_draws_do_not_depend_on_the_rest_of_the_batch(seed: int, epoch: int, order: list[int]) -> None:
    whole = draw_crops(torch.arange(12), seed=seed, epoch=epoch, padding=4, flip=True)
    for part in (order, order[:5], order[5:6]):
        alone = draw_crops(torch.tensor(part), seed=seed, epoch=epoch, padding=4, flip=True)
        assert all(torch.equal(ours, all_of_them[part]) for ours, all_of_them in zip(alone, whole, strict=True))


def test_seeds_epochs_streams_and_samples_give_different_draws() -> None:
    samples = torch.arange(1000)
    keys = [{"seed": 0, "epoch": 0}, {"seed": 1, "epoch": 0}, {"seed": 0, "epoch": 1}]
    draws = [random_bits(samples, **key) for key in [*keys, {"seed": 0, "epoch": 0, "stream": 1}]]
    assert torch.cat(draws).unique().numel() == 4000
    crops = [draw_crops(samples, seed=key["seed"], epoch=key["epoch"], padding=4, flip=True) for key in keys]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        for ours, theirs in zip(crops[first], crops[second], strict=True):
            assert (ours != theirs).float().mean() > 0.4


@pytest.mark.parametrize("padding", [1, 2])
def test_offsets_and_flips_are_uniform_and_independent(padding: int) -> None:
    samples = torch.arange(20_000)
    top, left, mirrored = draw_crops(samples, seed=7, epoch=3, padding=padding, flip=True, vertical_flip=True)
    offsets = 2 * padding + 1
    assert chi_square((top * offsets + left) * 4 + mirrored, 4 * offsets**2) < 1
    later = draw_crops(samples, seed=7, epoch=4, padding=padding, flip=True, vertical_flip=True)
    assert chi_square((top * offsets + later.top) * 4 + (mirrored ^ later.mirrored), 4 * offsets**2) < 1
    assert chi_square(top[:-1] * offsets + top[1:], offsets**2) < 1


def test_disabling_flips_does_not_change_the_crops() -> None:
    samples = torch.arange(500)
    still, mirrored = (draw_crops(samples, seed=0, epoch=0, padding=4, flip=flip) for flip in (False, True))
    assert not still.mirrored.any()
    assert mirrored.mirrored.unique().tolist() == [0, 1]
    assert torch.equal(still.top, mirrored.top)
    assert torch.equal(still.left, mirrored.left)


def test_uniform_is_uniform_in_the_unit_interval() -> None:
    values = uniform(torch.arange(20_000), seed=0, epoch=0)
    assert values.dtype == torch.float32
    assert values.min() >= 0
    assert values.max() < 1
    assert chi_square((values * 50).long(), 50) < 1


@pytest.mark.parametrize(
    ("mean", "std"), [((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)), ((0.305,), (0.376,)), ((0, 0), (1, 1))]
)
def test_normalize_matches_torchvision(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8).repeat(1, len(mean), 1, 1)
    expected = torchvision.transforms.Normalize(mean, std)(images.double() / 255)
    ours = normalize(images, mean=mean, std=std)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-6)


def test_normalize_refuses_mean_and_std_of_different_length() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        normalize(torch.zeros(1, 2, 2, 2, dtype=torch.uint8), mean=(0.5, 0.5), std=(0.5,))


def chi_square(cells: Tensor, number: int) -> float:
    """Return how many times five standard deviations the statistic is above its mean: below 1 for uniform draws."""
    counts = cells.bincount(minlength=number).double()
    expected = len(cells) / number
    statistic = ((counts - expected) ** 2 / expected).sum() - (number - 1)
    return float(statistic / (2 * (number - 1)) ** 0.5 / 5)
