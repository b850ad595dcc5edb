"""mixup and CutMix against a loop over images."""

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.plugins.precision import HalfPrecision
from on_other_device import on_other_device
from torch import Tensor

from kd_lightning.data.augmentation.mixing import Mixing, draw_mixing, from_units, mix_, to_units

NO_BOX = to_units(torch.empty(0, 4))
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def distinct_images(count: int, height: int = 6, width: int = 5) -> Tensor:
    """Return images of which no two share a value."""
    return torch.arange(count * 2 * height * width).float().view(count, 2, height, width)


def draw(samples: Tensor, *, mixup: float = 0.4, cutmix: float = 1.0, seed: int = 3, view: int = 2) -> Mixing:
    labelled = torch.ones(len(samples), dtype=torch.bool)
    drawn = draw_mixing(
        samples,
        candidates=torch.arange(0, 1000, 5),
        labelled=labelled,
        seed=seed,
        view=view,
        mixup=mixup,
        cutmix=cutmix,
    )
    assert drawn is not None
    return drawn


def by_sample(samples: Tensor) -> dict[int, tuple[int, list[float]]]:
    """Return the partner of each sample, and its fraction or its box."""
    drawn = draw(samples)
    kinds = [[value] for value in drawn.fraction.tolist()] + drawn.box.tolist()
    rows = zip(samples[drawn.rows].tolist(), drawn.partners.tolist(), kinds, strict=True)
    return {sample: (partner, kind) for sample, partner, kind in rows}


@few
@given(shares=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6))
def test_mixup_matches_a_loop_over_images(shares: list[float]) -> None:
    count = len(shares)
    images, partners = distinct_images(2 * count).split(count)
    mixing = Mixing(torch.arange(count), torch.arange(count), to_units(torch.tensor(shares)), NO_BOX)
    labels, classes = torch.eye(7)[:count], torch.arange(1, count + 1)
    mixed, targets = mix_(images.clone(), partners, labels, classes, mixing)
    for i, share in enumerate(shares):
        torch.testing.assert_close(mixed[i], share * images[i] + (1 - share) * partners[i])
        torch.testing.assert_close(targets[i], share * labels[i] + (1 - share) * torch.eye(7)[i + 1])


@few
@given(data=st.data())
def test_cutmix_matches_a_loop_over_pixels(data: st.DataObject) -> None:
    height, width = (data.draw(st.integers(1, 7)) for _ in range(2))
    unit = st.floats(0, 1, width=32)
    top, bottom = sorted(data.draw(st.tuples(unit, unit)))
    left, right = sorted(data.draw(st.tuples(unit, unit)))
    image, partner = distinct_images(2, height, width).split(1)
    box = to_units(torch.tensor([[top, left, bottom, right]]))
    top, left, bottom, right = from_units(box)[0].tolist()
    mixing = Mixing(torch.tensor([0]), torch.tensor([9]), to_units(torch.empty(0)), box)
    mixed, targets = mix_(image.clone(), partner, torch.eye(3)[:1], torch.tensor([2]), mixing)
    expected, pasted = image.clone(), 0
    middles = [(torch.arange(length) + 0.5) / length for length in (height, width)]
    for y in range(height):
        for x in range(width):
            if top <= middles[0][y] < bottom and left <= middles[1][x] < right:
                expected[0, :, y, x] = partner[0, :, y, x]
                pasted += 1
    assert torch.equal(mixed, expected)
    area = pasted / (height * width)
    torch.testing.assert_close(targets[0], torch.tensor([1 - area, 0, area]))


@pytest.mark.parametrize(("mixup", "cutmix", "kinds"), [(0.4, 0.0, "m"), (0.0, 1.0, "c"), (0.4, 1.0, "mc")])
def test_mixed_labels_match_the_mixed_pixels(mixup: float, cutmix: float, kinds: str) -> None:
    count = 200
    images, partners = distinct_images(2 * count).split(count)
    mixing = draw(torch.arange(count), mixup=mixup, cutmix=cutmix)
    labels = torch.eye(5)[torch.arange(count) % 5]
    others = (mixing.rows + 1) % 5  # a partner has the next class of the row that it is mixed into
    mixed, targets = mix_(images.clone(), partners[mixing.rows], labels, others, mixing)
    torch.testing.assert_close(targets.sum(1), torch.ones(count))
    seen: list[str] = []
    for i in range(count):
        own = float(targets[i] @ labels[i])
        ours, theirs = mixed[i] == images[i], mixed[i] == partners[i]
        if bool((ours | theirs).all()) and "c" in kinds:
            torch.testing.assert_close(own, ours.float().mean().item())
            seen += "c" if 0 < own < 1 else ""
        else:
            torch.testing.assert_close(mixed[i], own * images[i] + (1 - own) * partners[i], rtol=1e-4, atol=1e-2)
            seen += "m"
    assert set(seen) == set(kinds)
    if len(kinds) == 2:
        assert 70 < seen.count("m") < 130


@few
@given(order=st.permutations(range(30)), count=st.integers(1, 30))
def test_draws_depend_on_the_sample_and_not_on_its_batch(order: list[int], count: int) -> None:
    whole, part = by_sample(torch.arange(30)), by_sample(torch.tensor(order[:count]))
    assert part == {sample: whole[sample] for sample in order[:count]}


def test_other_seeds_and_views_draw_other_partners() -> None:
    samples = torch.arange(200)
    first = draw(samples, cutmix=0.0).partners
    for other in (draw(samples, cutmix=0.0, seed=4), draw(samples, cutmix=0.0, view=3)):
        assert (other.partners != first).float().mean() > 0.9


def test_unlabelled_rows_are_not_mixed_and_partners_are_candidates() -> None:
    labelled = torch.arange(40) % 3 > 0
    candidates = torch.tensor([4, 8, 15])
    options: dict[str, Any] = {"candidates": candidates, "seed": 0, "view": 0, "mixup": 0.2, "cutmix": 0.0}
    drawn = draw_mixing(torch.arange(40), labelled=labelled, **options)
    assert drawn is not None
    assert torch.equal(drawn.rows, labelled.nonzero().flatten())
    assert drawn.partners.unique().tolist() == [4, 8, 15]
    assert draw_mixing(torch.arange(40), labelled=torch.zeros(40, dtype=torch.bool), **options) is None


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_fractions_follow_the_beta_distribution(alpha: float) -> None:
    samples = torch.arange(20_000)
    shares = from_units(draw(samples, mixup=alpha, cutmix=0.0).fraction).double()
    assert abs(shares.mean() - 0.5) < 0.01
    assert abs(shares.var() - 1 / (4 * (2 * alpha + 1))) < 0.005
    boxes = from_units(draw(samples, mixup=0.0, cutmix=alpha).box).double()
    sides = boxes[:, 2:] - boxes[:, :2]
    inside = (boxes > 0).all(1) & (boxes < 1).all(1)  # not clipped at the border
    torch.testing.assert_close(sides[inside, 0], sides[inside, 1], rtol=0, atol=1e-6)


def test_no_precision_of_a_trainer_rounds_what_is_drawn() -> None:
    drawn = draw(torch.arange(50))
    for kept in HalfPrecision("bf16-true").convert_input(drawn), pickle.loads(pickle.dumps(drawn)):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(kept, drawn, strict=True))


@on_other_device
def test_images_are_mixed_on_their_device() -> None:
    mixing = draw(torch.arange(4))
    there = Mixing(*(values.to("other") for values in mixing))
    images, partners = distinct_images(8).split(4)
    labels, classes = torch.eye(4), torch.arange(4)
    expected = mix_(images.clone(), partners, labels, classes, mixing)
    found = mix_(images.to("other"), partners.to("other"), labels.to("other"), classes.to("other"), there)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device.type == "other"
        assert torch.equal(ours.cpu(), theirs)
