import pytest
import torch
from random_inputs import random_outputs
from torch import Tensor

from kd_lightning.losses import CorrelationLoss, correlation_loss

_LABELS = torch.full((5,), -1)


def pair() -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, 5, 3, dtype=torch.float64)
    return student, teacher


def test_a_value_by_hand() -> None:
    student = torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.0, 1.0]])
    assert correlation_loss(student, torch.zeros(3, 2)) == ((3 + 8) + (0 + 4)) / 2
    assert correlation_loss(student + 5, torch.full((3, 2), 5.0)) == ((3 + 8) + (0 + 4)) / 2
    assert correlation_loss(student[[0, 2, 1]], torch.zeros(3, 2)) == ((0 + 2) + (0 + 4)) / 2  # the order counts


def test_is_zero_if_one_of_two_neighbours_agrees_and_for_a_single_sample() -> None:
    student, teacher = pair()
    assert correlation_loss(teacher, teacher.clone()) == 0
    student[::2] = teacher[::2]
    assert correlation_loss(student, teacher) == 0
    student, teacher = pair()
    assert correlation_loss(student, teacher) > 0.1
    assert correlation_loss(student[:1], teacher[:1]) == 0


def test_scales_with_the_square_of_a_factor() -> None:
    student, teacher = pair()
    loss = correlation_loss(student, teacher)
    torch.testing.assert_close(correlation_loss(-3 * student, -3 * teacher), 9 * loss)
    torch.testing.assert_close(correlation_loss(student.flip(0), teacher.flip(0)), loss)
    torch.testing.assert_close(correlation_loss(teacher, student), loss)


def test_refuses_shapes_that_would_be_broadcast() -> None:
    with pytest.raises(
        ValueError,
        match=r"^correlation_loss compares features of one shape, got \(5, 1\) of the student and \(5, 3\) of the "
        r"teacher; map one to the other's shape first\.$",
    ):
        correlation_loss(torch.randn(5, 1), torch.randn(5, 3))


def test_linear_layers_embed_both_in_one_width() -> None:
    student, teacher = random_outputs(5, a=(3, 2, 4), b=(6,)), random_outputs(5, a=(7,), b=(8,))
    loss, copy = (CorrelationLoss(student_layers=["a", "b"], dimensions=4) for _ in range(2))
    loss.build(student, teacher)
    learned = loss.state_dict()
    assert {name: tuple(value.shape) for name, value in learned.items() if name.endswith("weight")} == {
        "student_embeddings.0.weight": (4, 3),
        "student_embeddings.1.weight": (4, 6),
        "teacher_embeddings.0.weight": (4, 7),
        "teacher_embeddings.1.weight": (4, 8),
    }
    expected = torch.zeros(())
    for i, layer in enumerate("ab"):
        s, t = student.features[layer], teacher.features[layer]
        s, t = s.mean((2, 3)) if layer == "a" else s, t
        embedded = [
            x @ learned[f"{side}_embeddings.{i}.weight"].T + learned[f"{side}_embeddings.{i}.bias"]
            for side, x in (("student", s), ("teacher", t))
        ]
        expected += correlation_loss(*embedded)
    torch.testing.assert_close(loss(student, teacher, _LABELS), expected)
    copy.build(student, teacher)
    assert copy(student, teacher, _LABELS) != loss(student, teacher, _LABELS)
    copy.load_state_dict(learned)
    assert copy(student, teacher, _LABELS) == loss(student, teacher, _LABELS)


def test_defaults_match_the_benchmark() -> None:
    loss = CorrelationLoss()
    assert (loss.weight, loss.dimensions, loss.warmup_epochs) == (0.02, 128, 0)
    assert (loss.student_layers, loss.gather) == (("avgpool",), True)
    assert CorrelationLoss(weight=2.0, warmup_epochs=4).weight_at(0) == 0.5


def test_refuses_zero_dimensions() -> None:
    with pytest.raises(ValueError, match=r"^dimensions must be >= 1, got 0\.$"):
        CorrelationLoss(dimensions=0)
