from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_inputs import Array, random_labels, random_logits
from scipy.special import log_softmax, softmax

from kd_lightning.features import Outputs
from kd_lightning.losses import NKDLoss, nkd_loss


def plain_nkd(student: Array, teacher: Array, labels: list[int], temperature: float, gamma: float) -> float:
    rows = []
    for s, t, y in zip(student, teacher, labels, strict=True):
        if y >= 0:
            others = [c for c in range(len(s)) if c != y]
            p, q = softmax(t[others] / temperature), log_softmax(s[others] / temperature)
            rows.append(-softmax(t)[y] * log_softmax(s)[y] - gamma * temperature**2 * float(p @ q))
    return float(np.mean(rows))


@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (2, 3), (5, 4), (6, 50)])
@pytest.mark.parametrize(("temperature", "gamma"), [(1.0, 1.5), (2.5, 0.7)])
def test_matches_the_published_formula(rows: int, classes: int, temperature: float, gamma: float) -> None:
    (student, teacher), labels = random_logits(rows, classes), random_labels(rows, classes)
    value = nkd_loss(student, teacher, labels, temperature=temperature, gamma=gamma)
    expected = plain_nkd(student.numpy(), teacher.numpy(), labels.tolist(), temperature, gamma)
    assert value.item() == pytest.approx(expected, rel=1e-10)


def test_gradients_pass_gradcheck() -> None:
    student, teacher = random_logits(4, 5)
    labels = random_labels(4, 5)
    assert torch.autograd.gradcheck(lambda s: nkd_loss(s, teacher, labels, temperature=3.0), student.requires_grad_())


def test_the_gradient_of_the_other_classes_vanishes_where_both_agree_on_them() -> None:
    _, teacher = random_logits(4, 5)
    labels = torch.tensor([0, 1, 2, 3])
    student = teacher + torch.randn(4, 1, dtype=torch.float64) * F.one_hot(labels, 5)  # other logits of the labels
    student.requires_grad_()
    with_others, without = (nkd_loss(student, teacher, labels, gamma=gamma) for gamma in (2.0, 0.0))
    assert with_others > without
    (gradient,) = torch.autograd.grad(with_others - without, student)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_a_teacher_that_gives_the_label_no_probability_teaches_the_other_classes_only() -> None:
    student, teacher = random_logits(3, 4)
    labels = torch.tensor([0, 3, 1])
    teacher[torch.arange(3), labels] = -1e4
    assert nkd_loss(student, teacher, labels, gamma=0.0) == 0
    assert nkd_loss(student, teacher, labels, gamma=1.0) > 0


def test_invariant_to_a_constant_added_to_a_row() -> None:
    (student, teacher), labels = random_logits(6, 5), random_labels(6, 5)
    shift = 10 * torch.randn(2, 6, 1, dtype=torch.float64)
    torch.testing.assert_close(
        nkd_loss(student + shift[0], teacher + shift[1], labels), nkd_loss(student, teacher, labels)
    )


def test_unlabelled_rows_are_left_out_and_of_probabilities_the_largest_counts() -> None:
    student, teacher = random_logits(4, 5)
    labels = torch.tensor([2, -1, 0, -1])
    value = nkd_loss(student, teacher, labels)
    torch.testing.assert_close(value, nkd_loss(student[::2], teacher[::2], labels[::2]))
    mixed = 0.7 * F.one_hot(labels.clamp(min=0), 5) + 0.3 * F.one_hot(torch.tensor([1, 1, 4, 4]), 5)
    mixed[labels < 0] = -1.0
    torch.testing.assert_close(nkd_loss(student, teacher, mixed), value)
    none = nkd_loss(student.requires_grad_(), teacher, torch.full((4,), -1))
    none.backward()
    assert none == 0
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_the_module_passes_its_options_and_defaults_match_the_released_code() -> None:
    (student, teacher), labels = random_logits(6, 5), random_labels(6, 5)
    loss = NKDLoss(temperature=2.0, gamma=0.5, weight=0.7, warmup_epochs=2)
    expected = nkd_loss(student, teacher, labels, temperature=2.0, gamma=0.5)
    torch.testing.assert_close(loss(Outputs(student), Outputs(teacher), labels), expected)
    assert (loss.weight, loss.weight_at(0)) == (0.7, 0.35)
    loss = NKDLoss()
    assert (loss.weight, loss.temperature, loss.gamma, loss.warmup_epochs) == (1.0, 3.0, 3.5, 0)
    assert loss.compares_logits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"^temperature must be above 0, got 0\.0\.$"),
        ({"gamma": -1.0}, r"^gamma must be >= 0, got -1\.0\.$"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NKDLoss(**options)
