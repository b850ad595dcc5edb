from typing import Any

import pytest
import torch
from scipy.special import softmax
from scipy.stats import pearsonr
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses import DistLoss, dist_loss


def pair(rows: int = 6, classes: int = 5) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, rows, classes, dtype=torch.float64)
    return student, teacher


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_matches_scipys_correlations(temperature: float) -> None:
    student, teacher = pair()
    p, q = (softmax(z.numpy() / temperature, axis=1) for z in (student, teacher))
    samples = sum(1 - pearsonr(p[i], q[i]).statistic for i in range(6)) / 6
    classes = sum(1 - pearsonr(p[:, i], q[:, i]).statistic for i in range(5)) / 5
    for beta, gamma in ((1.0, 0.0), (0.0, 1.0), (2.0, 0.5)):
        expected = temperature**2 * (beta * samples + gamma * classes)
        assert dist_loss(student, teacher, beta=beta, gamma=gamma, temperature=temperature).item() == pytest.approx(
            expected, rel=1e-5
        )


def test_a_value_by_hand() -> None:
    """Two classes in opposite order correlate with -1, for every sample, and for every class over two such samples."""
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    assert dist_loss(logits, logits.flip(1), beta=1.0, gamma=0.0).item() == pytest.approx(2, rel=1e-6)
    assert dist_loss(logits, logits.flip(1), beta=0.0, gamma=3.0).item() == pytest.approx(6, rel=1e-6)
    # temperature 2 brings the probabilities closer together and does not change their correlation
    assert dist_loss(logits, logits.flip(1), beta=1.0, gamma=1.0, temperature=2.0).item() == pytest.approx(16, rel=1e-6)


def test_is_zero_at_equality_and_positive_elsewhere() -> None:
    student, teacher = pair()
    same = teacher.clone().requires_grad_()
    loss = dist_loss(same, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(same.grad, torch.zeros_like(teacher), atol=1e-6, rtol=0)
    assert dist_loss(student, teacher) > 0.1


def test_invariant_to_shift_and_scale_of_probabilities() -> None:
    _, teacher = pair()
    probabilities = teacher.softmax(1)
    fraction = torch.rand(6, 1, dtype=torch.float64) * 0.5 + 0.25
    for factor in (fraction[:1], fraction):  # of all samples, or of each its own
        mixed = (factor * probabilities + (1 - factor) / 5).log()
        assert dist_loss(mixed, teacher, beta=1.0, gamma=0.0).item() == pytest.approx(0, abs=1e-6)
    assert dist_loss(mixed, teacher, beta=0.0, gamma=1.0) > 1e-3
    mixed = (fraction[0] * probabilities + (1 - fraction[0]) / 5).log()
    assert dist_loss(mixed, teacher, beta=0.0, gamma=1.0).item() == pytest.approx(0, abs=1e-5)


def test_invariant_to_a_constant_added_to_a_row_and_to_order() -> None:
    student, teacher = pair()
    loss = dist_loss(student, teacher)
    shift = 10 * torch.randn(2, 6, 1, dtype=torch.float64)
    torch.testing.assert_close(dist_loss(student + shift[0], teacher + shift[1]), loss)
    rows, classes = torch.randperm(6), torch.randperm(5)
    torch.testing.assert_close(dist_loss(student[rows], teacher[rows]), loss)
    torch.testing.assert_close(dist_loss(student[:, classes], teacher[:, classes]), loss)


def test_logits_and_temperature_scale_together() -> None:
    student, teacher = pair()
    scaled = dist_loss(3 * student, 3 * teacher, temperature=6.0)
    torch.testing.assert_close(scaled, 9 * dist_loss(student, teacher, temperature=2.0))


def test_values_lie_in_their_range() -> None:
    for student, teacher in (pair(), (pair()[0], -pair()[0])):
        assert 0 <= dist_loss(student, teacher, beta=1.0, gamma=2.0, temperature=3.0) <= 2 * 9 * 3


def test_the_module_passes_its_options_and_ignores_labels() -> None:
    student, teacher = pair()
    loss = DistLoss(temperature=3.0, beta=0.5, gamma=2.0, weight=0.7, warmup_epochs=2)
    one, other = (loss(Outputs(student), Outputs(teacher), torch.full((6,), label)) for label in (-1, 3))
    torch.testing.assert_close(one, dist_loss(student, teacher, beta=0.5, gamma=2.0, temperature=3.0))
    assert one == other
    assert (loss.weight, loss.weight_at(0)) == (0.7, 0.35)


def test_defaults_match_the_released_code() -> None:
    loss = DistLoss()
    assert (loss.temperature, loss.beta, loss.gamma, loss.weight) == (4.0, 1.0, 1.0, 2.0)
    assert loss.warmup_epochs == 0
    assert loss.gather
    assert loss.compares_logits
    student, teacher = pair()
    torch.testing.assert_close(
        dist_loss(student, teacher), dist_loss(student, teacher, beta=1.0, gamma=1.0, temperature=1.0)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"^temperature must be above 0, got -1\.0\.$"),
        ({"beta": -1.0}, r"^beta and gamma must be >= 0, got -1\.0 and 1\.0\.$"),
        ({"gamma": float("nan")}, r"^beta and gamma must be >= 0, got 1\.0 and nan\.$"),
        ({"weight": -1.0}, "weight must be >= 0"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistLoss(**options)
