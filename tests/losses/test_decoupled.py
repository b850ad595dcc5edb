import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses import DecoupledLoss, decoupled_loss, soft_target_loss

_LABELS = torch.tensor([0, 4, 2, 2, 1, 3])


def pair(rows: int = 6, classes: int = 5) -> tuple[Tensor, Tensor]:
    student, teacher = 2 * torch.randn(2, rows, classes, dtype=torch.float64)
    return student, teacher


def test_a_value_by_hand() -> None:
    """The teacher's probabilities are 1/2, 1/4, 1/4, the student's 1/3 each; the label is the second class."""
    teacher = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    target = math.log(0.25 / (1 / 3)) / 4 + 3 * math.log(0.75 / (2 / 3)) / 4
    others = 2 * math.log((2 / 3) / (1 / 2)) / 3 + math.log((1 / 3) / (1 / 2)) / 3
    for alpha, beta in ((1.0, 0.0), (0.0, 1.0), (1.0, 8.0)):
        loss = decoupled_loss(
            torch.zeros_like(teacher), teacher, torch.tensor([1]), alpha=alpha, beta=beta, temperature=1.0
        )
        assert loss.item() == pytest.approx(alpha * target + beta * others, rel=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_the_soft_target_loss_if_beta_is_the_teachers_non_target_probability(
    alpha: float, temperature: float
) -> None:
    student, teacher = pair(rows=1)
    student.requires_grad_()
    rest = 1 - (teacher / temperature).softmax(1)[0, 2].item()
    loss = decoupled_loss(student, teacher, torch.tensor([2]), alpha=alpha, beta=alpha * rest, temperature=temperature)
    expected = alpha * soft_target_loss(student, teacher, temperature=temperature)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (loss, expected)))


def test_is_zero_at_equality_and_positive_elsewhere() -> None:
    student, teacher = pair()
    same = teacher.clone().requires_grad_()
    loss = decoupled_loss(same, teacher, _LABELS)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(same.grad, torch.zeros_like(teacher))
    assert decoupled_loss(student, teacher, _LABELS) > 0.1


def test_invariant_to_a_constant_added_to_a_row() -> None:
    student, teacher = pair()
    shift = 10 * torch.randn(2, 6, 1, dtype=torch.float64)
    shifted = decoupled_loss(student + shift[0], teacher + shift[1], _LABELS)
    torch.testing.assert_close(shifted, decoupled_loss(student, teacher, _LABELS))


def test_logits_and_temperature_scale_together() -> None:
    student, teacher = pair()
    scaled = decoupled_loss(3 * student, 3 * teacher, _LABELS, temperature=12.0)
    torch.testing.assert_close(scaled, 9 * decoupled_loss(student, teacher, _LABELS, temperature=4.0))


def test_each_part_depends_only_on_its_classes() -> None:
    student, teacher = pair()
    student.requires_grad_()
    label = F.one_hot(_LABELS, 5).bool()
    (others,) = torch.autograd.grad(decoupled_loss(student, teacher, _LABELS, alpha=0.0, beta=1.0), student)
    assert (others[label] == 0).all()
    assert (others[~label] != 0).all()
    swapped = student.clone()
    for row, kept in enumerate(_LABELS.tolist()):  # the other classes, in reverse order
        rest = [c for c in range(5) if c != kept]
        swapped[row, rest] = student[row, rest[::-1]]
    target = decoupled_loss(swapped, teacher, _LABELS, alpha=1.0, beta=0.0)
    torch.testing.assert_close(target, decoupled_loss(student, teacher, _LABELS, alpha=1.0, beta=0.0))


def test_invariant_to_the_order_of_rows_and_classes() -> None:
    student, teacher = pair()
    loss = decoupled_loss(student, teacher, _LABELS)
    rows, classes = torch.randperm(6), torch.randperm(5)
    torch.testing.assert_close(decoupled_loss(student[rows], teacher[rows], _LABELS[rows]), loss)
    renamed = decoupled_loss(student[:, classes], teacher[:, classes], classes.argsort()[_LABELS])
    torch.testing.assert_close(renamed, loss)


def test_unlabelled_rows_are_ignored() -> None:
    student, teacher = pair()
    student.requires_grad_()
    labels = torch.tensor([0, -1, 2, -1, -1, 3])
    kept = labels >= 0
    loss = decoupled_loss(student, teacher, labels)
    torch.testing.assert_close(loss, decoupled_loss(student[kept], teacher[kept], labels[kept]))
    loss.backward()
    assert student.grad is not None
    assert (student.grad[~kept] == 0).all()
    assert (student.grad[kept] != 0).all()


def test_is_zero_without_labels() -> None:
    student, teacher = pair()
    student.requires_grad_()
    loss = decoupled_loss(student, teacher, torch.full((6,), -1))
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()  # type: ignore[union-attr]


def test_probabilities_count_as_their_most_probable_class() -> None:
    student, teacher = pair()
    mixed = 0.7 * F.one_hot(_LABELS, 5).float() + 0.3 * F.one_hot(_LABELS.flip(0), 5).float()
    expected = decoupled_loss(student, teacher, _LABELS)
    torch.testing.assert_close(decoupled_loss(student, teacher, mixed), expected)
    torch.testing.assert_close(decoupled_loss(student, teacher, mixed.half()), expected)


def test_the_module_passes_its_options() -> None:
    student, teacher = pair()
    loss = DecoupledLoss(alpha=0.5, beta=2.0, temperature=3.0, weight=0.7, warmup_epochs=2)
    term = loss(Outputs(student), Outputs(teacher), _LABELS)
    torch.testing.assert_close(term, decoupled_loss(student, teacher, _LABELS, alpha=0.5, beta=2.0, temperature=3.0))
    assert (loss.weight, loss.weight_at(0)) == (0.7, 0.35)
    assert loss.state_dict() == {}


def test_defaults_match_the_released_code() -> None:
    loss = DecoupledLoss()
    assert (loss.alpha, loss.beta, loss.temperature, loss.weight) == (1.0, 8.0, 4.0, 1.0)
    assert loss.warmup_epochs == 20
    assert loss.compares_logits
    student, teacher = pair()
    term = loss(Outputs(student), Outputs(teacher), _LABELS)
    torch.testing.assert_close(term, decoupled_loss(student, teacher, _LABELS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"^temperature must be above 0, got 0\.0\.$"),
        ({"temperature": float("nan")}, r"^temperature must be above 0, got nan\.$"),
        ({"alpha": -1.0}, r"^alpha and beta must be >= 0, got -1\.0 and 8\.0\.$"),
        ({"beta": -0.5}, r"^alpha and beta must be >= 0, got 1\.0 and -0\.5\.$"),
        ({"weight": -1.0}, "weight must be >= 0"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoupledLoss(**options)
