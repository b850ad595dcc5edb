"""mixup and CutMix against a loop over images."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning.data.augmentation.mixing import cutmix, mix, mixup

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def distinct_batch(count: int, height: int = 6, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of which no two share a value, and one-hot labels of as many classes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randperm(count * 2 * height * width, generator=generator).float().view(count, 2, height, width)
    return images, F.one_hot(torch.arange(count) % 5, 5).float()


@few
@given(shares=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_mixup_matches_a_loop_over_images(shares: list[float], seed: int) -> None:
    images, labels = distinct_batch(len(shares), seed=seed)
    mixed, targets = mixup(images, labels, torch.tensor(shares))
    for i, share in enumerate(shares):
        torch.testing.assert_close(mixed[i], share * images[i] + (1 - share) * images[i - 1])
        torch.testing.assert_close(targets[i], share * labels[i] + (1 - share) * labels[i - 1])
    torch.testing.assert_close(targets.sum(1), torch.ones(len(shares)))


@few
@given(data=st.data())
def test_cutmix_matches_a_loop_over_pixels(data: st.DataObject) -> None:
    count, height, width = (data.draw(st.integers(low, 7)) for low in (2, 1, 1))
    unit = st.floats(0, 1, width=32, exclude_max=True)
    shares = data.draw(st.lists(st.floats(0, 1, width=32), min_size=count, max_size=count))
    centres = data.draw(st.lists(st.tuples(unit, unit), min_size=count, max_size=count))
    images, labels = distinct_batch(count, height, width)
    mixed, targets = cutmix(images, labels, torch.tensor(shares), torch.tensor(centres))
    for i in range(count):
        half = torch.tensor(1 - shares[i]).sqrt() / 2
        expected, pasted = images[i].clone(), 0
        for y in range(height):
            for x in range(width):
                middle = torch.tensor([(y + 0.5) / height, (x + 0.5) / width])
                if ((middle - torch.tensor(centres[i])).abs() < half).all():
                    expected[:, y, x] = images[i - 1, :, y, x]
                    pasted += 1
        assert torch.equal(mixed[i], expected)
        area = pasted / (height * width)
        torch.testing.assert_close(targets[i], (1 - area) * labels[i] + area * labels[i - 1])
    torch.testing.assert_close(targets.sum(1), torch.ones(count))


def test_cutmix_pastes_a_box_of_the_given_area() -> None:
    images, labels = distinct_batch(2, height=40, width=40)
    mixed, _ = cutmix(images, labels, torch.tensor([0.75, 1.0]), torch.full((2, 2), 0.5))
    assert (mixed[0] != images[0]).all(0).nonzero().tolist() == [[y, x] for y in range(10, 30) for x in range(10, 30)]
    assert torch.equal(mixed[1], images[1])


def mix_options(mixup_alpha: float, cutmix_alpha: float) -> dict[str, float]:
    return {"mixup_alpha": mixup_alpha, "cutmix_alpha": cutmix_alpha}


@pytest.mark.parametrize(("alphas", "kinds"), [((0.4, 0.0), "m"), ((0.0, 1.0), "c"), ((0.4, 1.0), "mc")])
def test_mixed_labels_match_the_mixed_pixels(alphas: tuple[float, float], kinds: str) -> None:
    count = 200
    images, labels = distinct_batch(count)
    mixed, targets = mix(images, labels, torch.arange(count) + 7, seed=3, epoch=2, **mix_options(*alphas))
    torch.testing.assert_close(targets.sum(1), torch.ones(count))
    seen: list[str] = []
    for i in range(count):
        own = (targets[i] @ labels[i]).item()  # neighbours are of different classes
        ours, theirs = mixed[i] == images[i], mixed[i] == images[i - 1]
        if bool((ours | theirs).all()) and "c" in kinds:
            torch.testing.assert_close(own, ours.float().mean().item())
            seen += "c" if 0 < own < 1 else ""
        else:
            torch.testing.assert_close(mixed[i], own * images[i] + (1 - own) * images[i - 1], rtol=1e-4, atol=1e-2)
            seen += "m"
    assert set(seen) == set(kinds)
    if len(kinds) == 2:
        assert 70 < seen.count("m") < 130


def test_draws_depend_only_on_seed_sample_and_epoch() -> None:
    images, labels = distinct_batch(50)
    samples = torch.arange(50)

    def draw(seed: int, epoch: int, start: int = 0) -> Tensor:
        return mix(images[start:], labels[start:], samples[start:], seed=seed, epoch=epoch, **mix_options(1.0, 1.0))[0]

    first = draw(0, 0)
    assert torch.equal(first, draw(0, 0))
    # the first image of a batch has another neighbour; the others do not depend on where the batch starts
    assert torch.equal(first[21:], draw(0, 0, start=20)[1:])
    for other in (draw(1, 0), draw(0, 1)):
        assert (first != other).flatten(1).any(1).float().mean() > 0.9


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixing_coefficients_follow_the_beta_distribution(alpha: float) -> None:
    count = 20_000
    labels = F.one_hot(torch.arange(count) % 2, 2).float()
    _, targets = mix(
        torch.zeros(count, 1, 1, 1), labels, torch.arange(count), seed=0, epoch=0, **mix_options(alpha, 0.0)
    )
    shares = (targets * labels).sum(1).double()
    assert abs(shares.mean() - 0.5) < 0.01
    assert abs(shares.var() - 1 / (4 * (2 * alpha + 1))) < 0.005
