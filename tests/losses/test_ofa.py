"""OFA: the formula written out class by class, and its heads."""

from typing import Any

import pytest
import torch
from random_inputs import random_outputs
from restated import assert_equal_with_gradients
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses import OFALoss, ofa_loss

LABELS = torch.tensor([3, -1, 0, 2])


def restated(student: Tensor, teacher: Tensor, labels: list[int], eps: float, temperature: float) -> Tensor:
    rows = []
    for s, t, label in zip(student, teacher, labels, strict=True):
        p, q = ((z / temperature).exp() / (z / temperature).exp().sum() for z in (t, s))
        true = torch.tensor([float(c == label) for c in range(len(s))], dtype=torch.float64)
        rows.append(-sum(((p[c] + true[c]) ** eps - true[c]) * q[c].log() for c in range(len(s))))
    return torch.stack(rows).mean()  # type: ignore[arg-type]


@pytest.mark.parametrize(("eps", "temperature"), [(1.0, 1.0), (1.5, 1.0), (1.3, 2.5), (2.0, 4.0)])
def test_equals_the_formula(eps: float, temperature: float) -> None:
    labels = torch.tensor([2, -1, 0, 3, 3])
    student, teacher = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    assert_equal_with_gradients(
        lambda s, t: ofa_loss(s, t, labels, eps=eps, temperature=temperature),
        lambda s, t: restated(s, t, labels.tolist(), eps, temperature),
        [student],
        constant=[teacher],
    )


def test_with_eps_1_labels_have_no_effect() -> None:
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    torch.testing.assert_close(ofa_loss(student, teacher, LABELS), ofa_loss(student, teacher, LABELS.flip(0)))
    plain = -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(ofa_loss(student, teacher, LABELS), plain)
    assert ofa_loss(student, teacher, LABELS, eps=1.5) != ofa_loss(student, teacher, LABELS.flip(0), eps=1.5)


def test_a_shift_of_any_row_changes_nothing_and_probabilities_count_as_their_largest() -> None:
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    expected = ofa_loss(student, teacher, LABELS, eps=1.5)
    torch.testing.assert_close(ofa_loss(student + 4, teacher - 3, LABELS, eps=1.5), expected)
    soft = 0.9 * torch.eye(5)[LABELS.clamp(min=0)] + 0.02
    soft[1] = -1
    torch.testing.assert_close(ofa_loss(student, teacher, soft, eps=1.5), expected)


def test_saturated_logits_stay_finite() -> None:
    student, teacher = 1e4 * torch.randn(4, 5), 1e4 * torch.randn(4, 5)
    student.requires_grad_()
    value = ofa_loss(student, teacher, LABELS, eps=1.5)
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_the_class_has_a_head_on_each_layer_and_is_saved_and_rebuilt() -> None:
    def loss() -> OFALoss:
        made = OFALoss(student_layers=["a", "b", "c"], eps=1.5, temperature=2.0)
        made.check(student, teacher)
        made.build(student, teacher)
        return made

    student, teacher = random_outputs(4, a=(3,), b=(5, 2, 2), c=(7, 6)), random_outputs(4)
    first, second = loss(), loss()
    assert [tuple(value.shape) for value in first.state_dict().values()] == [(5, 3), (5,), (5, 5), (5,), (5, 6), (5,)]
    assert first(student, teacher, LABELS) != second(student, teacher, LABELS)
    second.load_state_dict(first.state_dict())
    assert first(student, teacher, LABELS) == second(student, teacher, LABELS)
    assert (first.teacher_layers, first.compares_logits) == ((), True), "the teacher's logits can be cached"
    vectors = [student.features["a"], student.features["b"].mean((2, 3)), student.features["c"].mean(1)]
    logits = [student.logits, *(head(vector) for head, vector in zip(first.heads, vectors, strict=True))]
    expected = sum(ofa_loss(each, teacher.logits, LABELS, eps=1.5, temperature=2.0) for each in logits)
    torch.testing.assert_close(first(student, teacher, LABELS), expected)


@pytest.mark.parametrize("options", [{"eps": 0.0}, {"temperature": 0.0}])
def test_arguments_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^eps and temperature must be above 0, got "):
        OFALoss(**options)


def test_layers_without_a_vector_and_no_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^OFALoss has a head on each of student_layers; name at least one\.$"):
        OFALoss(student_layers=[])
    one_number = Outputs(torch.randn(2, 5), {"a": torch.randn(2)})
    with pytest.raises(ValueError, match=r"^OFALoss needs more than one number \(B,\) of layer 'a'; name another\.$"):
        OFALoss(student_layers=["a"]).check(one_number, one_number)


def test_defaults_are_the_published_ones() -> None:
    loss = OFALoss()
    assert (loss.weight, loss.eps, loss.temperature) == (1.0, 1.0, 1.0)
