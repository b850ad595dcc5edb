from typing import Any

import numpy as np
import pytest
import torch
from random_inputs import random_rotation
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses import MMDLoss, mmd_loss

_LABELS = torch.full((5,), -1)


def pair(m: int = 5, n: int = 7, width: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(m, width, dtype=torch.float64), torch.randn(n, width, dtype=torch.float64) + 1


def mean_squared_distance(source: Tensor, target: Tensor) -> float:
    """Return the mean over all pairs of samples, including each sample with itself."""
    rows = torch.cat([source, target]).detach().numpy()
    return float(np.mean([((a - b) ** 2).sum() for a in rows for b in rows]))


def double_sum(source: Any, target: Any, scale: float, bandwidths: tuple[float, ...], unbiased: bool) -> float:
    def kernel(a: Any, b: Any) -> float:
        return sum(float(np.exp(-((a - b) ** 2).sum() / (2 * w * scale))) for w in bandwidths)

    def within(rows: Any) -> float:
        pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if not unbiased or i != j]
        return sum(kernel(rows[i], rows[j]) for i, j in pairs) / len(pairs)

    across = sum(kernel(s, t) for s in source for t in target) / (len(source) * len(target))
    return within(source) + within(target) - 2 * across


CASES = [((0.5, 1.0, 2.0), True), ((0.5, 1.0, 2.0), False), ((0.3,), True), ((4.0, 1.0), False)]


@pytest.mark.parametrize("sizes", [(5, 7), (4, 4), (2, 9)], ids=str)
@pytest.mark.parametrize(("bandwidths", "unbiased"), CASES)
def test_matches_the_double_sum(bandwidths: tuple[float, ...], unbiased: bool, sizes: tuple[int, int]) -> None:
    source, target = pair(*sizes)
    expected = double_sum(source.numpy(), target.numpy(), mean_squared_distance(source, target), bandwidths, unbiased)
    assert mmd_loss(source, target, bandwidths=bandwidths, unbiased=unbiased).item() == pytest.approx(
        expected, rel=1e-10
    )


@pytest.mark.parametrize(("bandwidths", "unbiased"), CASES)
def test_gradients_match_finite_differences_at_a_fixed_scale(bandwidths: tuple[float, ...], unbiased: bool) -> None:
    source, target = (features.requires_grad_() for features in pair(3, 4, 2))
    mmd_loss(source, target, bandwidths=bandwidths, unbiased=unbiased).backward()
    scale, step = mean_squared_distance(source, target), 1e-6
    for moved in (source, target):
        expected = torch.zeros_like(moved)
        for place in np.ndindex(*moved.shape):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    moved[place] += sign * step
                rows = [features.detach().numpy().copy() for features in (source, target)]
                values.append(double_sum(rows[0], rows[1], scale, bandwidths, unbiased))
                with torch.no_grad():
                    moved[place] -= sign * step
            expected[place] = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(moved.grad, expected, rtol=1e-5, atol=1e-8)


def test_a_value_by_hand() -> None:
    """Two samples at 0 and two at 1: the squared distances are 0 or 1, their mean is 1/2."""
    source, target = torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    for unbiased in (True, False):
        value = mmd_loss(source, target, bandwidths=(1.0,), unbiased=unbiased)
        assert value.item() == pytest.approx(2 - 2 * np.exp(-1.0))


def test_the_unbiased_estimate_has_mean_zero_for_equal_domains() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(400, 12, 4, dtype=torch.float64, generator=generator)
    for unbiased in (True, False):
        values = torch.stack([mmd_loss(batch[:5], batch[5:], unbiased=unbiased) for batch in batches])
        error = values.std() / len(values) ** 0.5
        assert bool(abs(values.mean()) < 3 * error) == unbiased
        assert bool((values >= 0).all()) != unbiased
    shifted = torch.stack([mmd_loss(batch[:5], batch[5:] + 1) for batch in batches])
    assert shifted.mean() > 20 * shifted.std() / len(shifted) ** 0.5


def test_the_biased_estimate_is_zero_at_equality_and_both_are_symmetric() -> None:
    source, target = pair()
    assert mmd_loss(source, source.flip(0), unbiased=False).item() == pytest.approx(0, abs=1e-12)
    assert mmd_loss(source, source.clone()) < 0
    for unbiased in (True, False):
        torch.testing.assert_close(
            mmd_loss(target, source, unbiased=unbiased), mmd_loss(source, target, unbiased=unbiased)
        )


@pytest.mark.parametrize("unbiased", [True, False])
def test_invariant_to_shift_rotation_scale_and_order(unbiased: bool) -> None:
    source, target = pair()
    loss = mmd_loss(source, target, unbiased=unbiased)
    rotation = random_rotation(3)
    changed = mmd_loss(3 * source.flip(0) @ rotation + 5, 3 * target @ rotation + 5, unbiased=unbiased)
    torch.testing.assert_close(changed, loss)
    assert not torch.isclose(mmd_loss(source + 1, target, unbiased=unbiased), loss, rtol=1e-3)


def test_the_unbiased_estimate_of_a_single_sample_is_zero() -> None:
    for m, n in ((1, 4), (4, 1), (1, 1)):
        source, target = (features.requires_grad_() for features in pair(m, n))
        value = mmd_loss(source, target)
        value.backward()
        assert value == 0
        for features in (source, target):
            assert features.grad is not None
            assert (features.grad == 0).all()
        assert mmd_loss(source, target, unbiased=False) > 0.1


def test_gradient_descent_aligns_the_domains() -> None:
    source, target = pair(40, 40)
    target = (target + 2).requires_grad_()
    start = mmd_loss(source, target).item()
    for _ in range(60):
        (gradient,) = torch.autograd.grad(mmd_loss(source, target), target)
        target = (target - 20 * gradient).detach().requires_grad_()
    assert mmd_loss(source, target).item() < start / 10
    assert (target.mean(0) - source.mean(0)).norm() < 1  # from 5


def test_refuses_different_widths() -> None:
    with pytest.raises(
        ValueError,
        match=r"^Domains are compared in one space, got 3 numbers per sample of the source and 4 per sample of the "
        r"target; read both from the same layer\.$",
    ):
        mmd_loss(torch.randn(5, 3), torch.randn(5, 4))


def test_the_module_averages_maps_and_sums_layers() -> None:
    loss = MMDLoss()
    assert (loss.weight, loss.warmup_epochs, loss.bandwidths, loss.unbiased) == (1.0, 0, (0.5, 1.0, 2.0), True)
    assert (loss.layers, loss.gather) == (("avgpool",), True)
    loss = MMDLoss(weight=2.0, layers=["a", "b"], bandwidths=[0.7], unbiased=False, warmup_epochs=2)
    source = Outputs(torch.randn(5, 2), {"a": torch.randn(5, 3, 4, 2), "b": torch.randn(5, 6)})
    target = Outputs(torch.randn(4, 2), {"a": torch.randn(4, 3, 4, 2), "b": torch.randn(4, 6)})
    expected = mmd_loss(
        source.features["a"].mean((2, 3)), target.features["a"].mean((2, 3)), bandwidths=[0.7], unbiased=False
    )
    expected += mmd_loss(source.features["b"], target.features["b"], bandwidths=[0.7], unbiased=False)
    torch.testing.assert_close(loss(source, target, _LABELS), expected)
    assert (loss.weight, loss.weight_at(0)) == (2.0, 1.0)
    assert loss.state_dict() == {}


@pytest.mark.parametrize(
    ("bandwidths", "shown"), [((), r"\[\]"), ((1.0, 0.0), r"\[1\.0, 0\.0\]"), ([-1.0], r"\[-1\.0\]")]
)
def test_refuses_invalid_bandwidths(bandwidths: Any, shown: str) -> None:
    with pytest.raises(ValueError, match=rf"^bandwidths must be numbers above 0, got {shown}\.$"):
        MMDLoss(bandwidths=bandwidths)
