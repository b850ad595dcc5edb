"""Choices for the views of a batch: in any process, batch, rank and epoch the same."""

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import in_epoch, on_rank
from torch import Tensor

from kd_lightning import Augmentation, DigitsDataModule
from kd_lightning.data import Batch
from kd_lightning.data.augmentation.mixing import _fractions
from kd_lightning.data.augmentation.view_plan import ViewDrawer, ViewPlan

few = settings(max_examples=20, deadline=None, derandomize=True, database=None)
LABELS = torch.arange(40) % 5 - (torch.arange(40) % 4 == 0).long() * 6  # every fourth is unlabelled
LABELS = LABELS.clamp(min=-1)


def drawer(preset: str = "strong", views: int | None = None, **options: Any) -> ViewDrawer:
    augmentation = Augmentation.resolve(Augmentation(preset=preset, **options), Augmentation())
    candidates = torch.arange(40)[LABELS >= 0]
    return ViewDrawer(augmentation, (16, 20), 3, views, LABELS, candidates)


def choices(plan: ViewPlan | None, count: int) -> list[list[object]]:
    """Return what is chosen for each row of a batch and, where it is mixed, for its partner."""
    assert plan is not None
    assert plan.colours is not None
    layout = torch.arange(len(plan.samples))
    of_row: list[Any] = [[sample] for sample in plan.samples.tolist()]
    for order, calls in zip(plan.colours.orders[:-1], plan.colours.stages.calls, strict=True):
        layout = layout[order]
        for call in calls:
            for row in layout[call.start : call.end].tolist():
                of_row[row].append((call.name, call.strength))
    if plan.erasing is not None:
        for row, box in zip(plan.erasing.rows.tolist(), plan.erasing.boxes.tolist(), strict=True):
            of_row[row].append(box)
    if plan.mixing is not None:
        assert plan.partner_labels is not None
        amounts = [*plan.mixing.fraction.tolist(), *plan.mixing.box.tolist()]
        mixed = zip(plan.mixing.rows.tolist(), amounts, plan.partner_labels.tolist(), of_row[count:], strict=True)
        for row, amount, label, partner in mixed:
            of_row[row] += [amount, label, partner]
    return of_row[:count]


@few
@given(rows=st.lists(st.integers(0, 39), min_size=1, max_size=40, unique=True), epoch=st.integers(0, 5))
def test_choices_for_a_sample_do_not_depend_on_its_batch(rows: list[int], epoch: int) -> None:
    samples = torch.arange(40)
    whole = choices(drawer()(samples, LABELS, epoch), 40)
    part = choices(drawer()(samples[rows], LABELS[rows], epoch), len(rows))
    assert part == [whole[row] for row in rows]


def test_a_copy_in_another_process_draws_the_same() -> None:
    first = drawer()
    plan = first(torch.arange(40), LABELS, 2)
    _fractions.cache_clear()
    again = pickle.loads(pickle.dumps(first))(torch.arange(40), LABELS, 2)
    assert choices(again, 40) == choices(plan, 40)
    assert choices(pickle.loads(pickle.dumps(plan)), 40) == choices(plan, 40)


def test_fixed_views_come_back_and_new_ones_do_not() -> None:
    samples = torch.arange(40)
    fixed = [choices(drawer(views=3)(samples, LABELS, epoch), 40) for epoch in range(7)]
    assert fixed[0] == fixed[3] == fixed[6]
    assert fixed[1] == fixed[4]
    new = [choices(drawer()(samples, LABELS, epoch), 40) for epoch in range(7)]
    assert new[:3] == fixed[:3]
    assert all(new[i] != new[j] for i in range(7) for j in range(i))


@pytest.mark.parametrize("labels", [torch.tensor([2]), torch.tensor([-1])])
def test_a_batch_of_one(labels: Tensor) -> None:
    plan = drawer()(torch.tensor([8]), labels, 0)
    assert plan is not None
    assert (plan.mixing is None) == (labels < 0).item()
    assert len(plan.samples) == 1 + (labels >= 0).item()


@pytest.mark.parametrize(("preset", "epoch"), [("strong", -1), ("light", 0), ("none", 0)])
def test_there_is_no_plan_where_there_is_no_choice(preset: str, epoch: int) -> None:
    assert drawer(preset)(torch.arange(4), LABELS[:4], epoch) is None


# --- through the loaders


def shown(data: DigitsDataModule, *, epoch: int = 1, context: str | None = None) -> dict[int, tuple[Tensor, Tensor]]:
    """Return images and labels of an epoch by their ids."""
    loader = in_epoch(data.train_dataloader(), epoch)
    if context is not None:
        loader.multiprocessing_context = context
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for stored in loader:
        batch: Batch = data.augment(stored)
        found |= dict(zip(batch.ids.tolist(), zip(batch.images, batch.labels, strict=True), strict=True))
    return found


def digits(preset: str, **options: Any) -> DigitsDataModule:
    return DigitsDataModule(augmentation=Augmentation(preset=preset), **{"batch_size": 23, "views": 2} | options)


def assert_equal_where_both(first: dict[int, tuple[Tensor, Tensor]], second: dict[int, tuple[Tensor, Tensor]]) -> None:
    both = first.keys() & second.keys()
    assert len(both) > 1000
    for name in both:
        for ours, theirs in zip(first[name], second[name], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("preset", ["standard", "strong"])
def test_ranks_and_batch_sizes_do_not_change_an_image_nor_its_label(preset: str) -> None:
    whole = shown(digits(preset))
    assert_equal_where_both(whole, shown(digits(preset, batch_size=40), epoch=3))
    of_ranks: dict[int, tuple[Tensor, Tensor]] = {}
    for rank in range(3):
        part = shown(on_rank(digits(preset), 3, rank))
        assert not of_ranks.keys() & part.keys()
        of_ranks |= part
    assert_equal_where_both(whole, of_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("context", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_show_the_same_images(context: str) -> None:
    assert_equal_where_both(shown(digits("strong")), shown(digits("strong", num_workers=1), context=context))
