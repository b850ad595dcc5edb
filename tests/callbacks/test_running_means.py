import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_lightning.callbacks.running_means import RunningMeans


def test_equals_numpys_weighted_average() -> None:
    means, values, counts = RunningMeans(), torch.randn(7, 2), torch.randint(1, 50, (7, 2))
    for row, weights in zip(values, counts, strict=True):
        means.add({"a": row[0], "b": row[1]}, {"a": int(weights[0]), "b": weights[1]})
    expected = np.average(values.double().numpy(), axis=0, weights=counts.numpy())
    assert {name: value.item() for name, value in means.compute().items()} == pytest.approx(
        dict(zip("ab", expected, strict=True)), rel=1e-5
    )


def test_the_mean_does_not_depend_on_the_split_into_steps() -> None:
    rows = torch.rand(100)
    for splits in ([100], [1, 49, 50], [10] * 10, [1] * 100):
        means = RunningMeans()
        for part in rows.split(splits):
            means.add({"loss": part.mean()}, {"loss": len(part)})
        torch.testing.assert_close(means.compute()["loss"], rows.mean())


def test_empty_means() -> None:
    assert RunningMeans().compute() == {}
    assert RunningMeans().state_dict() == {"names": [], "sums": None}


def test_a_step_with_count_0_is_left_out() -> None:
    means = RunningMeans()
    means.add({"a": torch.tensor(5.0)}, {"a": 0})
    assert math.isnan(means.compute()["a"])
    means.add({"a": torch.tensor(2.0)}, {"a": torch.tensor(3)})
    assert means.compute()["a"] == 2


def test_the_order_of_the_counts_does_not_matter() -> None:
    means = RunningMeans()
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, {"b": 1, "a": 3, "c": 9})
    means.add({"a": torch.tensor(5.0), "b": torch.tensor(4.0)}, {"b": 1, "a": 1})
    assert means.compute() == {"a": 2.0, "b": 3.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_are_float32(dtype: torch.dtype) -> None:
    means = RunningMeans()
    for _ in range(1000):
        means.add({"a": torch.tensor(1.0, dtype=dtype)}, {"a": 128})
    assert means.compute()["a"].dtype == torch.float32
    assert means.compute()["a"] == 1
    assert means.sums is not None
    assert means.sums[1, 0] == 128_000  # more than float16 can hold


def test_no_graph_is_kept() -> None:
    means, value = RunningMeans(), torch.ones((), requires_grad=True)
    means.add({"a": 2 * value}, {"a": 4})
    assert not means.compute()["a"].requires_grad


def test_means_of_the_summed_sums_of_all_ranks() -> None:
    ranks = [RunningMeans(), RunningMeans()]
    ranks[0].add({"a": torch.tensor(1.0)}, {"a": 3})
    ranks[1].add({"a": torch.tensor(5.0)}, {"a": 1})
    total = torch.stack([rank.sums for rank in ranks if rank.sums is not None]).sum(0)
    assert ranks[0].compute(total) == ranks[1].compute(total) == {"a": 2.0}
    assert ranks[0].compute() == {"a": 1.0}


def test_means_continue_from_a_loaded_state() -> None:
    expected, first, second = RunningMeans(), RunningMeans(), RunningMeans()
    steps: list[tuple[dict[str, Tensor], dict[str, Tensor | int]]] = [
        ({"a": torch.randn(()), "b": torch.randn(())}, {"a": count, "b": 1}) for count in (3, 1, 7)
    ]
    for values, counts in steps:
        expected.add(values, counts)
    first.add(*steps[0])
    second.load_state_dict(first.state_dict())
    for values, counts in steps[1:]:
        second.add(values, counts)
    assert second.compute() == expected.compute()
    assert first.compute() == {name: value.float() for name, value in steps[0][0].items()}


def test_the_state_loads_with_weights_only(tmp_path: Path) -> None:
    means = RunningMeans()
    means.add({"a": torch.tensor(2.0)}, {"a": 4})
    torch.save(means.state_dict(), tmp_path / "state.pt")
    again = RunningMeans()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.compute() == {"a": 2.0}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("saved", [False, True])
def test_undoing_a_step_removes_all_its_values(steps: int, saved: bool) -> None:
    means = RunningMeans()
    for step in range(steps):
        means.begin_step()
        means.add({"a": torch.tensor(float(step))}, {"a": 1})
        means.undo_step(torch.tensor(False))
    before = means.compute()
    means.begin_step()
    for value in (1.0, math.nan):
        means.add({"a": torch.tensor(value)}, {"a": 1})
        if saved:
            state, means = means.state_dict(), RunningMeans()
            means.load_state_dict(state)
    means.undo_step(torch.tensor(True))
    assert means.sums is not None
    assert means.sums[1, 0] == steps
    assert steps == 0 or means.compute() == before
