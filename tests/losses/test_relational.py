from math import sqrt
from typing import Any

import pytest
import torch
from random_inputs import random_rotation
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses import RelationalLoss, relational, relational_loss


def pair(rows: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, dtype=torch.float64), torch.randn(rows, 7, dtype=torch.float64)


def test_values_by_hand() -> None:
    """A right-angled triangle, and three points in a line with the first in the middle."""
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    teacher = torch.tensor([[1.0], [0.0], [2.0]], dtype=torch.float64)
    mean = (2 + sqrt(2)) / 3
    short, long = (1 / mean - 3 / 4) ** 2 / 2, (sqrt(2) / mean - 3 / 2) ** 2 / 2
    distance = 2 * (2 * short + long) / 9
    assert relational_loss(student, teacher, distance_weight=1.0, angle_weight=0.0).item() == pytest.approx(
        distance, rel=1e-9
    )
    middle, ends = 1 / 2, (1 - sqrt(1 / 2)) ** 2 / 2  # cosines 0 and -1; 1/sqrt(2) and 1
    angle = 2 * (middle + 2 * ends) / 27
    assert relational_loss(student, teacher, distance_weight=0.0, angle_weight=1.0).item() == pytest.approx(
        angle, rel=1e-9
    )
    assert relational_loss(student, teacher).item() == pytest.approx(25 * distance + 50 * angle, rel=1e-9)


def test_is_zero_at_equality_and_positive_elsewhere() -> None:
    student, teacher = pair()
    assert relational_loss(teacher, teacher.clone()) == 0
    assert relational_loss(student, teacher, distance_weight=1.0, angle_weight=0.0) > 1e-3
    assert relational_loss(student, teacher, distance_weight=0.0, angle_weight=1.0) > 1e-3


@pytest.mark.parametrize(
    "weights", [{"distance_weight": 1.0, "angle_weight": 0.0}, {"distance_weight": 0.0, "angle_weight": 1.0}]
)
def test_invariant_to_shift_rotation_and_scale(weights: dict[str, float]) -> None:
    student, teacher = pair()
    loss = relational_loss(student, teacher, **weights)
    changed = relational_loss(3 * student @ random_rotation(3) + 5, 0.1 * teacher @ random_rotation(7) - 2, **weights)
    torch.testing.assert_close(changed, loss)
    order = torch.randperm(5)
    torch.testing.assert_close(relational_loss(student[order], teacher[order], **weights), loss)


@pytest.mark.parametrize(("cosines", "steps"), [(1, [1] * 7), (200, [4, 3]), (6 * 49, [6, 1]), (7 * 49, [7])])
def test_angles_in_chunks_of_anchors_have_the_same_value_and_gradient(
    monkeypatch: pytest.MonkeyPatch, cosines: int, steps: list[int]
) -> None:
    student, teacher = (features.requires_grad_() for features in pair(rows=7))
    whole = relational_loss(student, teacher)
    expected = torch.autograd.grad(whole, (student, teacher))
    taken = []
    computed = relational._cosines

    def recorded(rows: Tensor, start: int, end: int) -> Tensor:
        if rows is student:
            taken.append(end - start)
        return computed(rows, start, end)

    monkeypatch.setattr(relational, "_cosines", recorded)
    monkeypatch.setattr(relational, "_CHUNK", cosines)
    loss = relational_loss(student, teacher)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(torch.autograd.grad(loss, (student, teacher)), expected)
    assert taken[: len(steps)] == steps


def test_the_chunk_size_accounts_for_the_width_of_features(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 50, dtype=torch.float64)
    whole = relational_loss(student, teacher)
    largest = 0
    normed = torch.linalg.vector_norm

    def recorded(x: Tensor, **options: Any) -> Tensor:
        nonlocal largest
        largest = max(largest, x.numel())
        return normed(x, **options)

    monkeypatch.setattr(torch.linalg, "vector_norm", recorded)
    monkeypatch.setattr(relational, "_CHUNK", 400)
    torch.testing.assert_close(relational_loss(student, teacher), whole)
    assert largest == 400


def test_close_vectors_far_from_the_origin_keep_their_distances() -> None:
    student = (torch.randint(0, 8, (5, 3)) / 8).float()
    teacher = torch.randn(5, 7)
    loss = relational_loss(student + 1024, teacher)
    torch.testing.assert_close(loss, relational_loss(student, teacher), rtol=1e-5, atol=0)


def test_a_collapsed_student_counts_as_equidistant() -> None:
    collapsed = torch.ones(3, 2)
    assert relational_loss(collapsed, torch.eye(3), distance_weight=1.0, angle_weight=0.0).item() == pytest.approx(
        0, abs=1e-6
    )
    # cosines of 0 instead of 1 and 1/2, two of each at every vertex
    assert relational_loss(collapsed, torch.eye(3), distance_weight=0.0, angle_weight=1.0).item() == pytest.approx(
        3.75 / 27
    )


def test_equal_vectors_give_a_finite_gradient() -> None:
    student, teacher = pair()
    student[1] = student[0]
    student.requires_grad_()
    relational_loss(student, teacher).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 100


def test_the_module_averages_maps_and_has_the_published_defaults() -> None:
    student, teacher = torch.randn(5, 3, 4, 2), torch.randn(5, 7)
    loss = RelationalLoss()
    assert (loss.weight, loss.distance_weight, loss.angle_weight) == (1.0, 25.0, 50.0)
    assert (loss.warmup_epochs, loss.student_layers, loss.gather) == (0, ("avgpool",), True)
    loss = RelationalLoss(
        weight=2.0, distance_weight=3.0, angle_weight=4.0, student_layers=["a"], teacher_layers=["b"], warmup_epochs=2
    )
    outputs = Outputs(torch.randn(5, 2), {"a": student}), Outputs(torch.randn(5, 2), {"b": teacher})
    term = loss(*outputs, torch.full((5,), -1))
    torch.testing.assert_close(
        term, relational_loss(student.mean((2, 3)), teacher, distance_weight=3.0, angle_weight=4.0)
    )
    assert (loss.weight, loss.weight_at(0)) == (2.0, 1.0)
    assert loss.state_dict() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance_weight": -1.0}, r"^distance_weight and angle_weight must be >= 0, got -1\.0 and 50\.0\.$"),
        ({"angle_weight": float("nan")}, r"^distance_weight and angle_weight must be >= 0, got 25\.0 and nan\.$"),
        ({"weight": -1.0}, "loss's weight must be >= 0"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RelationalLoss(**options)
