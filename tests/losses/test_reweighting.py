import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_inputs import random_outputs
from torch import Tensor, nn

from kd_lightning.features import Outputs
from kd_lightning.losses import ReweightedLoss, density_ratio, effective_sample_size, hard_target_loss

_LABELS = torch.tensor([3, -1, 0, 1, 2])


outputs = partial(random_outputs, classes=4, requires_grad=True)


def gaussians(rows: int = 512, width: int = 1) -> tuple[Outputs, Outputs]:
    """The source N(0, 1), the target N(1, 1) in the first direction: the true ratio is exp(x - 1/2)."""
    source, target = torch.randn(rows, width), torch.randn(rows, width)
    target[:, 0] += 1
    return Outputs(torch.zeros(rows, 2), {"a": source}), Outputs(torch.zeros(rows, 2), {"a": target})


@pytest.fixture(scope="module", params=[(0, 1), (16, 1), (0, 8)], ids=["linear", "hidden", "wide"])
def trained(request: pytest.FixtureRequest) -> tuple[ReweightedLoss, int]:
    hidden, width = request.param
    torch.manual_seed(0)
    loss = ReweightedLoss(layer="a", hidden=hidden)
    loss.build(*gaussians(width=width))
    optimizer = torch.optim.SGD(loss.parameters(), 0.1, momentum=0.9, nesterov=True)
    for _ in range(400):
        optimizer.zero_grad()
        loss(*gaussians(width=width), torch.zeros(512, dtype=torch.long)).backward()
        optimizer.step()
    return loss, width


def log_odds(loss: ReweightedLoss, source: Outputs, target: Outputs) -> Tensor:
    """Return the classifier's logits for the features of the source and then of the target."""
    rows = torch.cat([source.features["a"], target.features["a"]]).detach()
    rows = (rows - rows.mean(0)) / rows.std(0, correction=0) / rows.shape[1] ** 0.5
    with torch.no_grad():
        return loss.classifiers[0](rows).squeeze(1)


def linear_layer(loss: ReweightedLoss, index: int) -> nn.Linear:
    """Return a linear layer of the classifier."""
    layer = loss.get_submodule(f"classifiers.0.{index}")
    assert isinstance(layer, nn.Linear)
    return layer


def test_the_density_ratio_follows_bayes_rule() -> None:
    """Exact log-odds of N(0, 1) against N(1, 1), of which there are three times as many."""
    x = torch.randn(50, dtype=torch.float64)
    ratio = (x - 0.5).exp()
    odds = math.log(20 / 60) - ratio.log()
    torch.testing.assert_close(density_ratio(odds, source_size=20, target_size=60, bound=1e9), ratio / ratio.mean())
    clipped = ratio.clamp(max=2.0)
    torch.testing.assert_close(density_ratio(odds, source_size=20, target_size=60, bound=2.0), clipped / clipped.mean())


def test_domain_sizes_are_applied_before_the_bound() -> None:
    odds = torch.tensor([0.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(
        density_ratio(odds, source_size=8, target_size=1), density_ratio(odds, source_size=1, target_size=1)
    )  # 8 and 8 e^-2 are below 10
    bounded = torch.tensor([10.0, 80 * math.exp(-2)], dtype=torch.float64).clamp(max=10)
    torch.testing.assert_close(density_ratio(odds, source_size=80, target_size=1), bounded / bounded.mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("odds", [[1e4, 1e4, 9e3], [-1e4, 0.0, 1e4], [-1e4, -1e4, -1e4], [0.0, 0.0, 0.0]])
def test_weights_are_finite_with_mean_one(dtype: torch.dtype, odds: list[float]) -> None:
    weights = density_ratio(torch.tensor(odds, dtype=dtype), source_size=3, target_size=3)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    assert weights.mean().item() == pytest.approx(1)


def test_weights_decrease_with_the_odds_of_the_source() -> None:
    weights = density_ratio(torch.linspace(-2, 2, 9), source_size=1, target_size=1)
    assert (weights.diff() < 0).all()


def test_effective_sample_size() -> None:
    assert effective_sample_size(torch.full((7,), 0.3)).item() == pytest.approx(7)
    assert effective_sample_size(torch.tensor([0.0, 5.0, 0.0])) == 1
    assert effective_sample_size(torch.zeros(3)) == 0
    weights = torch.rand(9, dtype=torch.float64)
    expected = weights.sum() ** 2 / (weights**2).sum()
    torch.testing.assert_close(effective_sample_size(weights), expected)
    torch.testing.assert_close(effective_sample_size(1e-30 * weights.float()).double(), expected)
    assert effective_sample_size(torch.full((4,), 3e4, dtype=torch.float16)).dtype == torch.float32


def test_recovers_the_density_ratio_of_gaussians(trained: tuple[ReweightedLoss, int]) -> None:
    loss, width = trained
    source, target = gaussians(4000, width)
    x = source.features["a"][:, 0].numpy()
    odds, truth = log_odds(loss, source, target)[:4000], np.exp(x - 0.5)
    assert np.corrcoef(density_ratio(odds, source_size=4000, target_size=4000, bound=100.0), truth)[0, 1] > 0.95
    weights = density_ratio(odds, source_size=4000, target_size=4000).numpy()
    assert np.corrcoef(weights, truth.clip(max=10))[0, 1] > 0.99
    assert abs(x.mean()) < 0.1  # the mean of the source; that of the target is 1
    assert (weights * x).mean() == pytest.approx(1, abs=0.15)
    assert (weights * x**2).mean() == pytest.approx(2, abs=0.4)
    assert loss.metrics["effective_sample_size"] < 350
    assert loss.metrics["domain_accuracy"].item() == pytest.approx(0.69, abs=0.06)  # Phi(1/2)


def test_the_classifier_is_calibrated_on_fresh_samples(trained: tuple[ReweightedLoss, int]) -> None:
    """The fraction of source samples in a bin is the predicted probability."""
    loss, width = trained
    odds = log_odds(loss, *gaussians(10_000, width))
    predicted, is_source = odds.sigmoid(), torch.arange(20_000) < 10_000
    for low in torch.arange(0.1, 0.9, 0.1):
        bin_ = (predicted >= low) & (predicted < low + 0.1)
        assert is_source[bin_].float().mean().item() == pytest.approx(predicted[bin_].mean().item(), abs=0.05)


def test_the_initial_loss_is_cross_entropy_plus_log_two() -> None:
    for hidden in (0, 8):
        source, target = outputs(5, a=(3, 2, 4)), outputs(7, a=(3, 2, 4))
        loss = ReweightedLoss(layer="a", hidden=hidden, penalty=0.0)
        loss.build(source, target)
        expected = hard_target_loss(source.logits, _LABELS) + math.log(2)
        torch.testing.assert_close(loss(source, target, _LABELS), expected)
        assert loss.metrics["effective_sample_size"].item() == pytest.approx(5)


@pytest.mark.parametrize("labels", [_LABELS, torch.rand(5, 4).softmax(1)], ids=["indices", "probabilities"])
def test_the_loss_matches_the_formula(labels: Tensor) -> None:
    source, target = outputs(5, a=(3,)), outputs(7, a=(3,))
    loss = ReweightedLoss(layer="a", label_smoothing=0.1, bound=1.5, penalty=0.3)
    loss.build(source, target)
    layer = linear_layer(loss, 0)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    odds = log_odds(loss, source, target)
    weights = density_ratio(odds[:5], source_size=5, target_size=7, bound=1.5)
    expected = hard_target_loss(source.logits, labels, label_smoothing=0.1, weights=weights)
    expected += F.binary_cross_entropy_with_logits(odds, torch.tensor([1.0] * 5 + [0.0] * 7))
    expected += 0.15 * layer.weight.square().sum()
    torch.testing.assert_close(loss(source, target, labels), expected)
    torch.testing.assert_close(loss.metrics["effective_sample_size"], effective_sample_size(weights))
    right = (odds[:5] > 0).sum() + (odds[5:] <= 0).sum()
    assert loss.metrics["domain_accuracy"].item() == pytest.approx(right.item() / 12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_of_a_half_precision_classifier_is_computed_in_float32(dtype: torch.dtype) -> None:
    source, target = outputs(50, a=(3,)), outputs(70, a=(3,))
    loss = ReweightedLoss(layer="a", penalty=0.0)
    loss.build(source, target)
    nn.init.normal_(linear_layer(loss, 0).weight)
    loss.to(dtype)
    rows = torch.cat([source.features["a"], target.features["a"]])
    rows = (rows - rows.mean(0)) / rows.std(0, correction=0) / 3**0.5
    odds = loss.classifiers[0](rows.to(dtype)).squeeze(1).float()
    learned = F.binary_cross_entropy_with_logits(odds, (torch.arange(120) < 50).float())
    term = loss(source, target, torch.full((50,), -1))
    torch.testing.assert_close(term, learned, rtol=1e-5, atol=0)


def test_features_and_weights_get_no_gradient() -> None:
    source, target = outputs(5, a=(3,)), outputs(7, a=(3,))
    loss = ReweightedLoss(layer="a")
    loss.build(source, target)
    nn.init.normal_(linear_layer(loss, 0).weight)
    loss(source, target, _LABELS).backward()
    assert source.features["a"].grad is None
    assert target.features["a"].grad is None
    assert target.logits.grad is None
    weights = density_ratio(log_odds(loss, source, target)[:5], source_size=5, target_size=7)
    logits = source.logits.detach().requires_grad_()
    hard_target_loss(logits, _LABELS, weights=weights).backward()
    torch.testing.assert_close(source.logits.grad, logits.grad)
    found = [parameter.grad for parameter in loss.parameters()]
    loss.zero_grad()
    (loss(source, target, torch.full((5,), -1))).backward()  # without labels the classifier learns the same
    for gradient, parameter in zip(found, loss.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_the_penalty_makes_weights_more_equal() -> None:
    sizes = []
    for penalty in (0.0, 0.3):
        torch.manual_seed(0)
        loss = ReweightedLoss(layer="a", penalty=penalty)
        loss.build(*gaussians())
        optimizer = torch.optim.SGD(loss.parameters(), 0.3, momentum=0.9)
        for _ in range(50):
            optimizer.zero_grad()
            loss(*gaussians(), torch.zeros(512, dtype=torch.long)).backward()
            optimizer.step()
        sizes.append(loss.metrics["effective_sample_size"].item())
    assert sizes[1] > 1.5 * sizes[0]


def test_invariant_to_shift_and_scale_of_features() -> None:
    source, target = outputs(5, a=(3,)), outputs(7, a=(3,))
    loss = ReweightedLoss(layer="a", hidden=4)
    loss.build(source, target)
    nn.init.normal_(linear_layer(loss, 2).weight)
    term = loss(source, target, _LABELS)
    moved = [o._replace(features={"a": 100 * o.features["a"] - 7}) for o in (source, target)]
    torch.testing.assert_close(loss(*moved, _LABELS), term, rtol=1e-4, atol=1e-5)


def test_learned_parts_are_in_the_state_dict() -> None:
    source, target = outputs(5, a=(3, 2, 2)), outputs(7, a=(3, 2, 2))
    loss = ReweightedLoss(layer="a", hidden=6)
    loss.build(source, target)
    assert {name: tuple(value.shape) for name, value in loss.state_dict().items()} == {
        "classifiers.0.0.weight": (6, 3),
        "classifiers.0.0.bias": (6,),
        "classifiers.0.2.weight": (1, 6),
        "classifiers.0.2.bias": (1,),
    }


def test_defaults() -> None:
    loss = ReweightedLoss()
    assert (loss.weight, loss.warmup_epochs, loss.layers, loss.gather) == (1.0, 0, ("avgpool",), True)
    assert (loss.label_smoothing, loss.bound, loss.penalty, loss.hidden) == (0.0, 10.0, 1e-3, 0)
    assert ReweightedLoss(weight=2.0, warmup_epochs=4).weight_at(0) == 0.5
    odds = torch.tensor([-9.0, 0.0])
    assert torch.equal(
        density_ratio(odds, source_size=1, target_size=1), density_ratio(odds, source_size=1, target_size=1, bound=10.0)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.1}, r"^label_smoothing must be in \[0, 1\], got 1\.1\.$"),
        ({"bound": 0.5}, r"^bound must be >= 1, got 0\.5\.$"),
        ({"bound": float("nan")}, r"^bound must be >= 1, got nan\.$"),
        ({"penalty": -1.0}, r"^penalty and hidden must be >= 0, got -1\.0 and 0\.$"),
        ({"hidden": -1}, r"^penalty and hidden must be >= 0, got 0\.001 and -1\.$"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReweightedLoss(**options)
