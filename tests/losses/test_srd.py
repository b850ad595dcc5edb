"""SRD: the three forms of the formula written out, and its properties."""

from math import log

import pytest
import torch
from random_inputs import random_outputs
from restated import assert_equal_with_gradients
from torch import Tensor, nn

from kd_lightning.features import Outputs
from kd_lightning.losses import SRDLoss, soft_target_loss, srd_deit_loss, srd_loss, srd_torchdistill_loss

LABELS = torch.tensor([3, -1, 0, 2])


def normalised(column: Tensor, eps: float) -> Tensor:
    mean = column.sum() / len(column)
    return (column - mean) / (((column - mean) ** 2).sum() / len(column) + eps) ** 0.5


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    rows = []
    for s, t in zip(student, teacher, strict=True):
        q, p = ((z / temperature).exp() / (z / temperature).exp().sum() for z in (s, t))
        rows.append((p * (p.log() - q.log())).sum())
    return torch.stack(rows).mean()


def restated(s: Tensor, s_logits: Tensor, t: Tensor, t_logits: Tensor, weight: Tensor) -> Tensor:
    student = torch.stack([weight @ sample.flatten(1).mean(1) for sample in s])
    teacher = torch.stack([sample.flatten(1).mean(1) for sample in t])
    total = student.new_zeros(())
    for d in range(teacher.shape[1]):
        total = total + ((normalised(student[:, d], 1e-4) - normalised(teacher[:, d], 1e-4)) ** 4).sum()
    return 2 * total.log() + divergence(s_logits, t_logits)


@pytest.mark.parametrize(("rows", "width", "teacher_width"), [(5, 3, 4), (3, 6, 2), (9, 2, 2)])
def test_equals_the_formula(rows: int, width: int, teacher_width: int) -> None:
    embed = nn.Linear(width, teacher_width, bias=False).double()
    inputs = [torch.randn(rows, width, 2, 3), torch.randn(rows, 4), torch.randn(rows, teacher_width, 4, 3)]
    assert_equal_with_gradients(
        lambda *t: srd_loss(*t, embed=embed),
        lambda s, s_logits, t, t_logits: restated(s, s_logits, t, t_logits, embed.weight),
        [*(each.double() for each in inputs), torch.randn(rows, 4, dtype=torch.float64)],
        [embed.weight],
    )


def test_the_deit_form_equals_the_formula() -> None:
    embed = nn.Linear(3, 5, bias=False).double()

    def correlations(s: Tensor, t: Tensor) -> Tensor:
        total = s.new_zeros(())
        for d in range(5):
            c = (normalised(s @ embed.weight[d], 0) * normalised(t[:, d], 0)).sum() / len(s)
            total = total + (c - 1) ** 4
        return (total + 1e-5).log()

    inputs = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    assert_equal_with_gradients(lambda s, t: srd_deit_loss(s, t, embed=embed), correlations, inputs, [embed.weight])


@pytest.mark.parametrize(("exponent", "temperature"), [(4.0, 1.0), (2.5, 3.0)])
def test_torchdistills_form_equals_the_formula(exponent: float, temperature: float) -> None:
    def formula(s: Tensor, t: Tensor, s_logits: Tensor, t_logits: Tensor) -> Tensor:
        return 2 * ((s - t).abs() ** exponent).sum().log() + divergence(s_logits, t_logits, temperature)

    shapes = [(6, 3), (6, 3), (6, 4), (6, 4)]
    assert_equal_with_gradients(
        lambda *t: srd_torchdistill_loss(*t, exponent=exponent, temperature=temperature),
        formula,
        [torch.randn(shape, dtype=torch.float64) for shape in shapes],
    )


def test_the_gradient_does_not_depend_on_the_scale_of_the_distance() -> None:
    """A factor k on the distance adds the constant 8 log k."""
    student, teacher, logits = torch.randn(6, 3), torch.randn(6, 3), torch.randn(6, 4)
    first = srd_torchdistill_loss(student, teacher, logits, logits)
    second = srd_torchdistill_loss(3 * student, 3 * teacher, logits, logits)
    torch.testing.assert_close(second, first + 8 * log(3))


def test_equality_is_finite_and_has_no_gradient() -> None:
    maps, logits = torch.randn(4, 3, 2, 2), torch.randn(4, 5)
    leaf = maps.clone().requires_grad_()
    value = srd_loss(leaf, logits, maps, logits, embed=nn.Identity())
    value.backward()
    assert value.isfinite()
    assert value < -100
    assert leaf.grad is not None
    assert leaf.grad.abs().max() == 0


def test_vectors_and_tokens_are_taken_as_well() -> None:
    maps, teacher, logits = torch.randn(4, 3, 2, 2), torch.randn(4, 5, 2, 2), torch.randn(4, 5)
    embed = nn.Linear(3, 5)
    expected = srd_loss(maps, logits, teacher, logits, embed=embed)
    for student in (maps.flatten(2).transpose(1, 2), maps.mean((2, 3))):
        torch.testing.assert_close(srd_loss(student, logits, teacher, logits, embed=embed), expected)


@pytest.mark.parametrize("correlation", [False, True])
def test_the_class_embeds_each_layer_and_is_saved_and_rebuilt(correlation: bool) -> None:
    def loss() -> SRDLoss:
        made = SRDLoss(student_layers=["a", "b"], correlation=correlation)
        made.build(student, teacher)
        return made

    student, teacher = random_outputs(4, a=(3, 2, 2), b=(4,)), random_outputs(4, a=(5, 4, 4), b=(6, 2))
    first, second = loss(), loss()
    assert [tuple(value.shape) for value in first.state_dict().values()] == [(5, 3), (2, 4)]
    assert first(student, teacher, LABELS) != second(student, teacher, LABELS)
    second.load_state_dict(first.state_dict())
    assert first(student, teacher, LABELS) == second(student, teacher, LABELS)
    kl = soft_target_loss(student.logits, teacher.logits, temperature=1.0)
    expected = kl
    for name, embed in zip("ab", first.embeds, strict=True):
        s, t = (
            f.mean((2, 3)) if f.dim() == 4 else f if f.shape[1:] == (4,) else f.mean(1)
            for f in (student.features[name], teacher.features[name])
        )
        distance = srd_loss(s, student.logits, t, teacher.logits, embed=embed) - kl
        one = srd_deit_loss(s, t, embed=embed) if correlation else distance
        expected = expected + one
    torch.testing.assert_close(first(student, teacher, LABELS), expected)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = random_outputs(4, a=(3,)), random_outputs(4, a=(5,), requires_grad=True)
    loss = SRDLoss(student_layers=["a"])
    loss.build(student, teacher)
    loss(student, Outputs(teacher.logits, teacher.features), LABELS).backward()
    assert teacher.logits.grad is None
    assert teacher.features["a"].grad is None


def test_defaults_are_the_published_ones() -> None:
    loss = SRDLoss()
    assert (loss.weight, loss.correlation, loss.gather, loss.compares_logits) == (1.0, False, True, True)
