import pytest
import torch
from random_inputs import random_rotation
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses import SimilarityLoss, similarity_loss


def pair() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 3, 2, 2, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)


def test_a_value_by_hand() -> None:
    """Two different images and two equal ones: rows (1, 0) and (1, 1) / sqrt(2)."""
    assert similarity_loss(torch.eye(2), torch.ones(2, 3)).item() == pytest.approx(1 - 0.5**0.5)


def test_is_zero_at_equality_and_positive_elsewhere() -> None:
    student, teacher = pair()
    assert similarity_loss(teacher, teacher.clone()) == 0
    assert similarity_loss(student, teacher) > 1e-3
    assert similarity_loss(student[:1], teacher[:1]).item() == pytest.approx(0)


def test_invariant_to_rotation_and_scale() -> None:
    student, teacher = pair()
    loss = similarity_loss(student, teacher)
    rotated = student.flatten(1) @ random_rotation(12)
    torch.testing.assert_close(similarity_loss(3 * rotated, -0.2 * teacher @ random_rotation(7)), loss)
    order = torch.randperm(5)
    torch.testing.assert_close(similarity_loss(student[order], teacher[order]), loss)
    assert not torch.isclose(similarity_loss(student + 1, teacher), loss)


def test_the_module_passes_its_layers_and_has_the_published_defaults() -> None:
    student, teacher = pair()
    loss = SimilarityLoss()
    assert (loss.weight, loss.warmup_epochs, loss.student_layers, loss.gather) == (3000.0, 0, ("layer3",), True)
    loss = SimilarityLoss(weight=2.0, student_layers=["a"], teacher_layers=["b"], warmup_epochs=2)
    outputs = Outputs(torch.randn(5, 2), {"a": student}), Outputs(torch.randn(5, 2), {"b": teacher})
    assert loss(*outputs, torch.full((5,), -1)) == similarity_loss(student, teacher)
    assert (loss.weight, loss.weight_at(0)) == (2.0, 1.0)
    assert loss.state_dict() == {}
