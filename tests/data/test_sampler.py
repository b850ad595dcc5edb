"""The order of samples on any number of ranks."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from kd_lightning.data.sampler import EpochSampler

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def order(
    count: int, size: int, training: bool, seed: int = 0, epoch: int = 0, world: int = 1, rank: int = 0
) -> list[int]:
    """Return the positions that a rank sees, after checking their epochs."""
    sampler = EpochSampler(range(count), batch_size=size, training=training, seed=seed, num_replicas=world, rank=rank)
    sampler.set_epoch(epoch)
    places = list(sampler)
    assert len(places) == len(sampler)
    assert {shown for _, shown in places} <= {epoch if training else -1}
    return [position for position, _ in places]


@few
@given(
    count=st.integers(0, 50),
    size=st.integers(1, 7),
    world=st.integers(1, 5),
    seed=st.integers(-5, 5),
    epoch=st.integers(0, 9),
)
def test_ranks_split_each_global_batch_contiguously(count: int, size: int, world: int, seed: int, epoch: int) -> None:
    whole = order(count, size * world, True, seed, epoch)
    ranks = [order(count, size, True, seed, epoch, world, rank) for rank in range(world)]
    steps = range(0, len(ranks[0]), size)
    assert [position for step in steps for rows in ranks for position in rows[step : step + size]] == whole
    assert len(whole) == count // (size * world) * size * world
    assert len(set(whole)) == len(whole)
    assert set(whole) <= set(range(count))


def test_each_epoch_is_a_different_permutation() -> None:
    epochs = [order(60, 6, True, epoch=epoch) for epoch in range(4)]
    assert all(sorted(positions) == list(range(60)) for positions in epochs)
    assert len({tuple(positions) for positions in [*epochs, list(range(60))]}) == 5


def test_the_dropped_samples_differ_between_epochs() -> None:
    left_out = {frozenset(range(10)) - set(order(10, 4, True, epoch=epoch)) for epoch in range(8)}
    assert {len(rest) for rest in left_out} == {2}
    assert len(left_out) > 3


def test_the_order_depends_only_on_seed_and_epoch() -> None:
    assert order(40, 8, True, seed=3, epoch=5) == order(40, 8, True, seed=3, epoch=5)
    assert order(40, 8, True, seed=3, epoch=5) == order(40, 4, True, seed=3, epoch=5)
    orders = {tuple(order(40, 8, True, seed=seed, epoch=epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@few
@given(count=st.integers(0, 30), size=st.integers(1, 7), world=st.integers(1, 5), epoch=st.integers(0, 3))
def test_evaluation_shows_every_sample_once(count: int, size: int, world: int, epoch: int) -> None:
    ranks = [order(count, size, False, epoch=epoch, world=world, rank=rank) for rank in range(world)]
    assert [position for rows in ranks for position in rows] == list(range(count))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


@pytest.mark.parametrize("training", [True, False])
def test_lightning_does_not_replace_the_sampler(training: bool) -> None:
    assert isinstance(EpochSampler(range(4), batch_size=2, training=training), DistributedSampler)


def stream(count: int, size: int, steps: int, epoch: int, seed: int = 0, world: int = 1, rank: int = 0) -> list[int]:
    """Return the positions of an epoch that takes the next rows of a stream."""
    sampler = EpochSampler(
        range(count), batch_size=size, training=True, seed=seed, num_replicas=world, rank=rank, steps=steps
    )
    sampler.set_epoch(epoch)
    places = list(sampler)
    assert len(places) == len(sampler) == steps * size
    assert {shown for _, shown in places} == {epoch}
    return [position for position, _ in places]


@few
@given(
    count=st.integers(1, 30),
    size=st.integers(1, 7),
    steps=st.integers(1, 5),
    world=st.integers(1, 3),
    seed=st.integers(-2, 2),
)
def test_epochs_of_fixed_length_continue_a_stream_of_permutations(
    count: int, size: int, steps: int, world: int, seed: int
) -> None:
    rows = [position for epoch in range(7) for position in stream(count, size * world, steps, epoch, seed)]
    for start in range(0, len(rows), count):
        taken = rows[start : start + count]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(range(count))
    ranks = [stream(count, size, steps, 3, seed, world, rank) for rank in range(world)]
    whole = [
        position for step in range(0, len(ranks[0]), size) for share in ranks for position in share[step : step + size]
    ]
    assert whole == stream(count, size * world, steps, 3, seed)


def test_permutations_of_a_stream_differ_between_passes_and_seeds_and_from_those_of_epochs() -> None:
    passes = [stream(12, 4, 3, epoch, seed) for epoch in range(6) for seed in range(3)]
    own = [order(12, 4, True, seed, epoch) for epoch in range(6) for seed in range(3)]
    assert len({tuple(positions) for positions in passes + own}) == 36


def test_a_stream_resumes_within_an_epoch() -> None:
    sampler = EpochSampler(range(5), batch_size=2, training=True, steps=4)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.first = (3, 1)
    assert list(sampler) == whole[2:]


# --- classes shown equally often


@few
@given(
    labels=st.lists(st.integers(-1, 4), min_size=1, max_size=40),
    seed=st.integers(-5, 5),
    epoch=st.integers(0, 9),
    world=st.integers(1, 3),
)
def test_a_balanced_epoch_shows_each_class_equally_often_and_unlabelled_samples_once(
    labels: list[int], seed: int, epoch: int, world: int
) -> None:
    def sampler(rank: int = 0, world: int = 1, size: int = 1) -> EpochSampler:
        options = {"seed": seed, "num_replicas": world, "rank": rank}
        made = EpochSampler(labels, batch_size=size, training=True, balanced=torch.tensor(labels), **options)
        made.set_epoch(epoch)
        return made

    shown = [position for position, _ in sampler()]
    assert shown == [position for position, _ in sampler()], "a function of the seed and the epoch"
    assert len(shown) == len(labels)
    times = Counter(shown)
    classes = Counter(labels[position] for position in shown)
    assert all(times[position] == 1 for position, label in enumerate(labels) if label == -1)
    for label in set(labels) - {-1}:
        members = [times[position] for position, other in enumerate(labels) if other == label]
        assert max(members) - min(members) <= 1, "each sample of a class as often as the others"
        assert abs(classes[label] - sum(label >= 0 for label in labels) / len(set(labels) - {-1})) < 1
    ranks = [[position for position, _ in sampler(rank, world)] for rank in range(world)]
    assert [position for rows in zip(*ranks, strict=True) for position in rows] == shown[: len(labels) // world * world]
