from typing import Any

import numpy as np
import pytest
import torch
from random_inputs import Array, random_rotation
from scipy.optimize import LinearConstraint, minimize
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses import (
    KernelMeanMatchingLoss,
    effective_sample_size,
    hard_target_loss,
    kernel_mean_matching,
    mmd_loss,
)

_LABELS = torch.tensor([3, -1, 0, 1, 2])


def pair(m: int = 30, n: int = 20, width: int = 2, shift: float = 1.0) -> tuple[Tensor, Tensor]:
    return torch.randn(m, width, dtype=torch.float64), torch.randn(n, width, dtype=torch.float64) + shift


def quadratic_program(
    source: Tensor, target: Tensor, ridge: float = 0.01, bandwidths: tuple[float, ...] = (0.5, 1.0, 2.0)
) -> tuple[Array, Array]:
    """Return A and t of the paper's objective w'Aw / 2 - t'w."""
    rows, m = torch.cat([source, target]).numpy(), len(source)
    distances = ((rows[:, None] - rows[None]) ** 2).sum(2)
    kernel = sum(np.exp(-distances / (2 * a * distances.mean())) for a in bandwidths)
    return kernel[:m, :m] / m + ridge * np.eye(m), kernel[:m, m:].mean(1)


def kkt_violation(among: Array, towards: Array, weights: Array, bound: float, tolerance: float) -> float:
    """Return the violation of the Karush-Kuhn-Tucker conditions, for the best multiplier of the mean."""
    infeasible = max(-weights.min(), weights.max() - bound, abs(weights.mean() - 1) - tolerance)
    gradient = among @ weights - towards
    # gradient - multiplier must be >= 0 below the bound, and <= 0 above 0
    at_least = gradient[weights > 1e-9].max(initial=-np.inf)
    at_most = gradient[weights < bound - 1e-9].min(initial=np.inf)
    if weights.mean() < 1 + tolerance - 1e-6:
        at_least = max(at_least, 0)
    if weights.mean() > 1 - tolerance + 1e-6:
        at_most = min(at_most, 0)
    return float(max(infeasible, at_least - at_most))


CASES = [
    (10.0, 0.1, 0.01),
    (10.0, 0.0, 0.01),
    (1.5, 0.0, 0.01),
    (1000.0, 0.9, 1e-3),
    (2.0, 0.05, 1e-4),
    (1.0, 1.0, 0.1),
]


@pytest.mark.parametrize("sizes", [(30, 20, 2, 1.0), (25, 40, 5, 0.3), (40, 40, 1, 2.0), (20, 1, 3, 0.0)], ids=str)
@pytest.mark.parametrize(("bound", "tolerance", "ridge"), CASES)
def test_the_kkt_conditions_are_met(
    sizes: tuple[int, int, int, float], bound: float, tolerance: float, ridge: float
) -> None:
    source, target = pair(*sizes)
    weights = kernel_mean_matching(source, target, bound=bound, tolerance=tolerance, ridge=ridge).numpy()
    assert kkt_violation(*quadratic_program(source, target, ridge), weights, bound, tolerance) < 1e-5


@pytest.mark.parametrize("shift", [-1.0, 4.0])
@pytest.mark.parametrize(("bound", "tolerance", "ridge"), CASES)
def test_the_objective_matches_scipys_solver(bound: float, tolerance: float, ridge: float, shift: float) -> None:
    source, target = pair(12, 15, 2, shift)
    among, towards = quadratic_program(source, target, ridge, (0.4, 3.0))
    weights = kernel_mean_matching(
        source, target, bound=bound, tolerance=tolerance, ridge=ridge, bandwidths=(0.4, 3.0)
    ).numpy()

    def objective(w: Array) -> float:
        return float(w @ among @ w / 2 - towards @ w)

    other = minimize(
        objective,
        np.ones(12),
        jac=lambda w: among @ w - towards,
        method="SLSQP",
        bounds=[(0, bound)] * 12,
        constraints=LinearConstraint(np.full((1, 12), 1 / 12), 1 - tolerance, 1 + tolerance),
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert other.success
    assert objective(weights) == pytest.approx(other.fun, abs=1e-7)
    assert np.abs(weights - other.x).max() < 1e-2


def test_the_mean_weight_stays_within_the_tolerance() -> None:
    """Without a limit, the mean weight is below 1 far from the target and above 1 around it."""
    source, target = pair(30, 20, 2, 4.0)
    means = [
        kernel_mean_matching(source, target, bound=10.0, tolerance=tolerance).mean().item()
        for tolerance in (1.0, 0.2, 0.0)
    ]
    assert means[0] < 0.7
    assert means[1:] == pytest.approx([0.8, 1.0], abs=1e-5)
    target = source[:3] * 0
    free = kernel_mean_matching(source, target, bound=10.0, tolerance=1.0).mean().item()
    assert free > 1.04
    assert kernel_mean_matching(source, target, bound=10.0, tolerance=0.02).mean().item() == pytest.approx(
        1.02, abs=1e-5
    )


@pytest.mark.parametrize("seed", range(3))
def test_recovers_the_density_ratio_of_gaussians(seed: int) -> None:
    """The source N(0, 1), the target N(1, 1)."""
    torch.manual_seed(seed)
    source, target = pair(400, 400, 1)
    weights = kernel_mean_matching(source, target)
    x = source[:, 0]
    truth = (x - 0.5).exp()
    few = x < 2  # above, the source has only a few samples
    assert np.corrcoef(weights[few], truth[few])[0, 1] > 0.95
    assert effective_sample_size(weights) < 350
    assert abs(x.mean() - target.mean()) > 0.9
    for bound, ridge, bias in ((10, 0.01, 0.15), (1000, 1e-3, 0.05)):  # bound and ridge leave some bias
        weights = kernel_mean_matching(source, target, bound=bound, ridge=ridge)
        assert abs(weights @ x / weights.sum() - target.mean()) < bias
        assert abs(weights @ x.square() / weights.sum() - target.square().mean()) < 5 * bias


def test_reweighting_reduces_the_mmd() -> None:
    """Samples of the source drawn by their weights are nearer to the target."""
    source, target = pair(200, 200, 2)
    weights = kernel_mean_matching(source, target)
    drawn = source[torch.multinomial(weights, 200, replacement=True)]
    assert mmd_loss(drawn, target) < mmd_loss(source, target) / 5


def test_equal_domains_get_equal_weights() -> None:
    source, _ = pair()
    weights = kernel_mean_matching(source, source.flip(0), ridge=1e-3)
    torch.testing.assert_close(weights, torch.ones(30, dtype=torch.float64), atol=0.15, rtol=0)
    assert effective_sample_size(weights) > 29.9


def test_invariant_to_shift_rotation_and_scale_and_equivariant_to_order() -> None:
    source, target = pair()
    weights = kernel_mean_matching(source, target)
    rotation = random_rotation(2)
    changed = kernel_mean_matching(3 * source.flip(0) @ rotation + 5, 3 * target.flip(0) @ rotation + 5)
    torch.testing.assert_close(changed, weights.flip(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_are_float32_or_float64(dtype: torch.dtype) -> None:
    source, target = (features.to(dtype).requires_grad_() for features in pair())
    weights = kernel_mean_matching(source, target)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not weights.requires_grad
    exact = kernel_mean_matching(source.double(), target.double())
    torch.testing.assert_close(weights.double(), exact, atol=1e-6, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(kernel_mean_matching(source, target), weights)


@pytest.mark.parametrize("bound", [1.0, 10.0])
@pytest.mark.parametrize("tolerance", [0.0, 0.1, 1.0])
def test_degenerate_features_give_finite_weights(bound: float, tolerance: float) -> None:
    usual = torch.randn(6, 3)
    for source in (torch.zeros(6, 3), usual, 1e4 * usual, usual[:1], usual[:1].expand(6, 3)):
        for target in (torch.ones(4, 3), torch.zeros(1, 3), 1e4 * torch.randn(5, 3), source):
            weights = kernel_mean_matching(source, target, bound=bound, tolerance=tolerance)
            assert weights.isfinite().all()
            assert ((weights >= 0) & (weights <= bound)).all()
            assert abs(weights.mean().item() - 1) < tolerance + 1e-5


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_features_give_nan(value: float) -> None:
    source, target = torch.randn(6, 3), torch.randn(5, 3)
    source[2, 1] = value
    assert kernel_mean_matching(source, target).isnan().all()
    assert kernel_mean_matching(target, source).isnan().all()


def test_the_module_weights_the_cross_entropy_and_gives_features_no_gradient() -> None:
    source = Outputs(torch.randn(5, 4, requires_grad=True), {"a": torch.randn(5, 3, 2, 4, requires_grad=True)})
    target = Outputs(torch.randn(7, 4, requires_grad=True), {"a": torch.randn(7, 3, 2, 4, requires_grad=True)})
    loss = KernelMeanMatchingLoss(
        weight=2.0,
        layer="a",
        label_smoothing=0.1,
        bound=3.0,
        tolerance=0.0,
        ridge=0.05,
        bandwidths=[0.7],
        warmup_epochs=2,
    )
    pooled = (o.features["a"].mean((2, 3)) for o in (source, target))
    weights = kernel_mean_matching(*pooled, bound=3.0, tolerance=0.0, ridge=0.05, bandwidths=[0.7])
    for labels in (_LABELS, torch.rand(5, 4).softmax(1)):
        expected = hard_target_loss(source.logits, labels, label_smoothing=0.1, weights=weights)
        torch.testing.assert_close(loss(source, target, labels), expected)
    torch.testing.assert_close(loss.metrics["effective_sample_size"], effective_sample_size(weights))
    loss(source, target, _LABELS).backward()
    assert source.logits.grad is not None
    assert all(o is None for o in (source.features["a"].grad, target.features["a"].grad, target.logits.grad))
    assert loss.state_dict() == {}
    assert (loss.weight, loss.weight_at(0)) == (2.0, 1.0)


def test_defaults() -> None:
    loss = KernelMeanMatchingLoss()
    assert (loss.weight, loss.warmup_epochs, loss.layers, loss.gather) == (1.0, 0, ("avgpool",), True)
    assert (loss.label_smoothing, loss.bound, loss.tolerance, loss.ridge) == (0.0, 10.0, 0.1, 0.01)
    assert loss.bandwidths == (0.5, 1.0, 2.0)
    source, target = pair()
    assert torch.equal(
        kernel_mean_matching(source, target),
        kernel_mean_matching(source, target, bound=10.0, tolerance=0.1, ridge=0.01, bandwidths=(0.5, 1.0, 2.0)),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bound": 0.9}, r"^bound must be >= 1, since weights have mean 1, got 0\.9\.$"),
        ({"tolerance": -0.1}, r"^tolerance must lie in \[0, 1\], got -0\.1\.$"),
        ({"tolerance": 1.1}, r"^tolerance must lie in \[0, 1\], got 1\.1\.$"),
        ({"ridge": 0.0}, r"^ridge must be >= 0\.0001, got 0\.0\.$"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel_mean_matching(*pair(), **options)
    with pytest.raises(ValueError, match=message):
        KernelMeanMatchingLoss(**options)


def test_other_invalid_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 numbers per sample of the source and 3 per sample of the target"):
        kernel_mean_matching(torch.randn(4, 2), torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"^label_smoothing must be in \[0, 1\], got -0\.1\.$"):
        KernelMeanMatchingLoss(label_smoothing=-0.1)
    with pytest.raises(ValueError, match=r"^bandwidths must be numbers above 0, got \[0\.0\]\.$"):
        KernelMeanMatchingLoss(bandwidths=[0.0])
