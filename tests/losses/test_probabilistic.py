from math import log

import pytest
import torch
from random_inputs import random_rotation
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses import ProbabilisticLoss, probabilistic_loss


def pair() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)


def test_a_value_by_hand() -> None:
    """Orthogonal vectors pick themselves with 2/3, equal ones with 1/2."""
    expected = (log(0.5 / (2 / 3)) + log(0.5 / (1 / 3))) / 4
    loss = probabilistic_loss(torch.eye(2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert probabilistic_loss(torch.ones(2, 3), torch.eye(2)).item() != pytest.approx(expected, rel=1e-3)


def test_is_zero_at_equality_and_positive_elsewhere() -> None:
    student, teacher = pair()
    same = teacher.clone().requires_grad_()
    loss = probabilistic_loss(same, teacher)
    loss.backward()
    assert loss == 0
    torch.testing.assert_close(same.grad, torch.zeros_like(teacher), atol=1e-6, rtol=0)
    assert probabilistic_loss(student, teacher) > 1e-3


def test_invariant_to_rotation_and_scale_of_vectors() -> None:
    student, teacher = pair()
    loss = probabilistic_loss(student, teacher)
    factors = torch.rand(5, 1, dtype=torch.float64) + 0.5
    changed = probabilistic_loss(factors * student @ random_rotation(3), 3 * teacher @ random_rotation(7))
    torch.testing.assert_close(changed, loss, rtol=1e-5, atol=0)
    order = torch.randperm(5)
    torch.testing.assert_close(probabilistic_loss(student[order], teacher[order]), loss)
    assert not torch.isclose(probabilistic_loss(student + 1, teacher), loss, rtol=1e-3)


def test_opposite_vectors_give_finite_values() -> None:
    for _ in range(100):
        vector = 300 * torch.randn(1, 512)
        student = torch.cat([vector, -vector]).requires_grad_()
        loss = probabilistic_loss(student, torch.rand(2, 5))
        loss.backward()
        assert loss.isfinite()
        assert student.grad is not None
        assert student.grad.isfinite().all()


def test_the_module_averages_maps_and_has_the_published_defaults() -> None:
    student, teacher = torch.randn(5, 3, 4, 2), torch.randn(5, 7)
    loss = ProbabilisticLoss()
    assert (loss.weight, loss.warmup_epochs, loss.student_layers, loss.gather) == (30000.0, 0, ("avgpool",), True)
    loss = ProbabilisticLoss(weight=2.0, student_layers=["a"], teacher_layers=["b"], warmup_epochs=2)
    outputs = Outputs(torch.randn(5, 2), {"a": student}), Outputs(torch.randn(5, 2), {"b": teacher})
    term = loss(*outputs, torch.full((5,), -1))
    torch.testing.assert_close(term, probabilistic_loss(student.mean((2, 3)), teacher))
    assert (loss.weight, loss.weight_at(0)) == (2.0, 1.0)
    assert loss.state_dict() == {}
