import math

import pytest
import torch
import torch.nn.functional as F
from random_inputs import random_outputs
from torch import Tensor

from kd_lightning.losses import VariationalLoss, variational_loss

_LABELS = torch.tensor([3, -1, 0])


def inverse_softplus(variance: Tensor) -> Tensor:
    return (variance - 1e-5).expm1().log()


def test_values_by_hand() -> None:
    """A squared error of 9 at a variance of 2, and one of 1 at a variance of 1/2."""
    means, teacher = torch.zeros(1, 2, 1, 1).double(), torch.tensor([3.0, 1.0]).double().view(1, 2, 1, 1)
    scales = inverse_softplus(torch.tensor([2.0, 0.5], dtype=torch.float64))
    expected = ((9 / (2 * 2) + math.log(2) / 2) + (1 / (2 * 0.5) + math.log(0.5) / 2)) / 2
    assert variational_loss(means, teacher, scales).item() == pytest.approx(expected, rel=1e-10)


def test_is_minimal_at_the_teacher_and_at_the_mean_squared_error() -> None:
    means, teacher = torch.randn(2, 4, 3, 5, 2, dtype=torch.float64)
    best = inverse_softplus((means - teacher).square().mean((0, 2, 3))).requires_grad_()
    loss = variational_loss(means, teacher, best)
    (gradient,) = torch.autograd.grad(loss, best)
    torch.testing.assert_close(gradient, torch.zeros_like(best))
    assert variational_loss(means, teacher, best + 0.1) > loss
    assert variational_loss(means, teacher, best - 0.1) > loss
    assert variational_loss(teacher, teacher, best) < variational_loss(0.9 * teacher + 0.1 * means, teacher, best)


def test_invariant_to_a_common_shift() -> None:
    means, teacher = torch.randn(2, 4, 3, 5, 2, dtype=torch.float64)
    scales = torch.randn(3, dtype=torch.float64)
    shifted = variational_loss(means + 7, teacher + 7, scales)
    torch.testing.assert_close(shifted, variational_loss(means, teacher, scales))


@pytest.mark.parametrize("scale", [-1e4, 1e4])
def test_extreme_variances_give_finite_values(scale: float) -> None:
    scales = torch.full((3,), scale, requires_grad=True)
    loss = variational_loss(torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2), scales)
    loss.backward()
    assert loss.isfinite()
    assert scales.grad is not None
    assert scales.grad.isfinite().all()


@pytest.mark.parametrize("variance", [1.1e-5, 1e-3, 0.5, 5.0, 1e4])
def test_variances_start_at_initial_variance(variance: float) -> None:
    loss = VariationalLoss(student_layers=["a"], initial_variance=variance)
    loss.build(random_outputs(3, a=(2, 4, 4)), random_outputs(3, a=(7, 4, 4)))
    (scale,) = loss.scales
    assert scale.shape == (7,)
    torch.testing.assert_close(F.softplus(scale.detach()) + 1e-5, torch.full((7,), variance), rtol=1e-3, atol=0)


def test_the_mean_is_computed_by_three_convolutions() -> None:
    student, teacher = random_outputs(3, a=(2, 8, 4), b=(4,)), random_outputs(3, a=(5, 4, 4), b=(6,))
    loss = VariationalLoss(student_layers=["a", "b"])
    loss.build(student, teacher)
    assert {name: tuple(value.shape) for name, value in loss.state_dict().items()} == {
        "means.0.0.weight": (5, 2, 1, 1),
        "means.0.2.weight": (5, 5, 1, 1),
        "means.0.4.weight": (5, 5, 1, 1),
        "means.1.0.weight": (6, 4, 1, 1),
        "means.1.2.weight": (6, 6, 1, 1),
        "means.1.4.weight": (6, 6, 1, 1),
        "scales.0": (5,),
        "scales.1": (6,),
    }
    expected = torch.zeros(())
    for i, layer in enumerate("ab"):
        s, t = (
            features.features[layer].reshape(3, features.features[layer].shape[1], -1, 4 if i == 0 else 1)
            for features in (student, teacher)
        )
        s = s.unflatten(2, (t.shape[2], -1)).mean(3)
        for depth in (0, 2, 4):
            weight = loss.state_dict()[f"means.{i}.{depth}.weight"][:, :, 0, 0]
            s = torch.einsum("bchw,dc->bdhw", s.relu() if depth else s, weight)
        expected += variational_loss(s, t, loss.scales[i].detach())
    torch.testing.assert_close(loss(student, teacher, _LABELS), expected)


def test_variances_are_trained_and_saved() -> None:
    student, teacher = random_outputs(3, a=(2, 4, 4)), random_outputs(3, a=(5, 4, 4))
    loss, copy = VariationalLoss(student_layers=["a"]), VariationalLoss(student_layers=["a"])
    loss.build(student, teacher)
    copy.build(student, teacher)
    start = loss.scales[0].detach().clone()
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    before = loss(student, teacher, _LABELS)
    before.backward()
    optimizer.step()
    assert (loss.scales[0] != start).all()  # the initial variance of 5 is too large
    assert (loss.scales[0] < start).all()
    after = loss(student, teacher, _LABELS)
    assert after < before
    copy.load_state_dict(loss.state_dict())
    assert copy(student, teacher, _LABELS) == after


def test_defaults_match_the_benchmark() -> None:
    loss = VariationalLoss()
    assert (loss.weight, loss.initial_variance, loss.warmup_epochs) == (1.0, 5.0, 0)
    assert loss.student_layers == loss.teacher_layers == ("layer1", "layer2", "layer3")
    assert VariationalLoss(weight=2.0, warmup_epochs=4).weight_at(0) == 0.5


@pytest.mark.parametrize("variance", [0.0, 1e-5, float("nan")])
def test_refuses_a_variance_below_its_bound(variance: float) -> None:
    with pytest.raises(ValueError, match=rf"^initial_variance must be above 1e-05, got {variance}\.$"):
        VariationalLoss(initial_variance=variance)
