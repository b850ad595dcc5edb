from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_inputs import Array, random_labels, random_logits
from scipy.special import rel_entr, softmax

from kd_lightning.features import Outputs
from kd_lightning.losses import RLDLoss, rld_loss

OPTIONS = {"alpha": 0.6, "beta": 3.0, "temperature": 2.0, "alpha_temperature": 1.5}


def plain_rld(student: Array, teacher: Array, labels: list[int], standardized: bool) -> float:
    rows = []
    for s, t, y in zip(student, teacher, labels, strict=True):
        if standardized:
            s, t = ((z - z.mean()) / (z.std(ddof=1) + 1e-7) for z in (s, t))
        if y >= 0:
            m, p = softmax(t / 1.5).max(), softmax(s / 1.5)[y]
            row = 0.6 * 1.5**2 * rel_entr([m, 1 - m], [p, 1 - p]).sum()
            below = [c for c in range(len(t)) if t[c] < t[y]]
            if below:
                row += 3.0 * 2.0**2 * rel_entr(softmax(t[below] / 2.0), softmax(s[below] / 2.0)).sum()
            rows.append(row)
    return float(np.mean(rows))


@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (2, 3), (5, 4), (6, 50)])
@pytest.mark.parametrize("standardized", [False, True])
def test_matches_the_published_formula(rows: int, classes: int, standardized: bool) -> None:
    (student, teacher), labels = random_logits(rows, classes), random_labels(rows, classes)
    value = rld_loss(student, teacher, labels, **OPTIONS, logit_stand=standardized)
    expected = plain_rld(student.numpy(), teacher.numpy(), labels.tolist(), standardized)
    assert value.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("standardized", [False, True])
def test_gradients_pass_gradcheck(standardized: bool) -> None:
    (student, teacher), labels = random_logits(4, 5), random_labels(4, 5)
    assert torch.autograd.gradcheck(
        lambda s: rld_loss(s, teacher, labels, **OPTIONS, logit_stand=standardized), student.requires_grad_()
    )


def test_a_wrong_teacher_gives_its_confidence_to_the_label_and_what_it_prefers_is_ignored() -> None:
    teacher = torch.tensor([[0.0, 5.0, 3.0, 2.0, 1.0]]).double()  # the label is the third class
    label = torch.tensor([2])
    student = torch.zeros(1, 5).double().requires_grad_()
    (gradient,) = torch.autograd.grad(rld_loss(student, teacher, label, alpha=0.0), student)
    assert (gradient[0, [1, 2]] == 0).all()
    assert (gradient[0, [0, 3, 4]] != 0).all()
    (gradient,) = torch.autograd.grad(rld_loss(student, teacher, label, beta=0.0), student)
    assert gradient[0, 2] < 0  # towards the teacher's confidence of another class
    swapped = teacher[:, [0, 2, 1, 3, 4]]
    torch.testing.assert_close(rld_loss(student, teacher, label, beta=0.0), rld_loss(student, swapped, label, beta=0.0))


@pytest.mark.parametrize("teacher", [[-1.0, 2.0, 3.0], [2.0, 2.0, 2.0]])
def test_a_row_without_a_class_below_the_label_compares_the_confidence_only(teacher: list[float]) -> None:
    student, label = torch.randn(1, 3).double().requires_grad_(), torch.tensor([0])
    value = rld_loss(student, torch.tensor([teacher]).double(), label, alpha=0.0)
    value.backward()
    assert value == 0
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_is_zero_where_both_agree_and_the_teacher_is_right() -> None:
    _, teacher = random_logits(4, 5)
    assert rld_loss(teacher, teacher, teacher.argmax(1)).item() == pytest.approx(0, abs=1e-12)


def test_unlabelled_rows_are_left_out_and_of_probabilities_the_largest_counts() -> None:
    student, teacher = random_logits(4, 5)
    labels = torch.tensor([2, -1, 0, -1])
    value = rld_loss(student, teacher, labels)
    torch.testing.assert_close(value, rld_loss(student[::2], teacher[::2], labels[::2]))
    mixed = 0.7 * F.one_hot(labels.clamp(min=0), 5) + 0.3 * F.one_hot(torch.tensor([1, 1, 4, 4]), 5)
    mixed[labels < 0] = -1.0
    torch.testing.assert_close(rld_loss(student, teacher, mixed), value)
    assert rld_loss(student, teacher, torch.full((4,), -1)) == 0


def test_the_module_passes_its_options_and_defaults_match_the_released_code() -> None:
    (student, teacher), labels = random_logits(6, 5), random_labels(6, 5)
    loss = RLDLoss(**OPTIONS, logit_stand=True, weight=0.7, warmup_epochs=2)
    expected = rld_loss(student, teacher, labels, **OPTIONS, logit_stand=True)
    torch.testing.assert_close(loss(Outputs(student), Outputs(teacher), labels), expected)
    assert (loss.weight, loss.weight_at(0)) == (0.7, 0.35)
    loss = RLDLoss()
    assert (loss.weight, loss.alpha, loss.beta, loss.warmup_epochs) == (1.0, 1.0, 8.0, 20)
    assert (loss.temperature, loss.alpha_temperature, loss.logit_stand) == (4.0, 1.0, False)
    assert loss.compares_logits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"^temperature and alpha_temperature must be above 0, got 0\.0 and 1\.0\.$"),
        ({"alpha_temperature": -1.0}, "must be above 0, got 4.0 and -1.0"),
        ({"alpha": -1.0}, r"^alpha and beta must be >= 0, got -1\.0 and 8\.0\.$"),
        ({"beta": float("nan")}, "got 1.0 and nan"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RLDLoss(**options)
