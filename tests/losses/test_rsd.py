"""RSD: the formula written out pair by pair of dimensions, and its properties."""

from itertools import product
from math import sqrt
from typing import Any

import pytest
import torch
from random_inputs import random_outputs
from restated import assert_equal_with_gradients, random_norm
from torch import Tensor, nn

from kd_lightning.losses import RSDLoss, rsd_loss, rsd_projector_loss

LABELS = torch.tensor([3, -1, 0, 2])


def restated(student: Tensor, teacher: Tensor, kappa: float) -> Tensor:
    def z_scores(column: Tensor) -> Tensor:
        mean = column.sum() / len(column)
        return (column - mean) / ((((column - mean) ** 2).sum() / len(column)) ** 0.5 + 1e-5)

    total = student.new_zeros(())
    for i, j in product(range(teacher.shape[1]), range(student.shape[1])):
        correlation = (z_scores(teacher[:, i]) * z_scores(student[:, j])).sum() / len(student)
        total = total + ((correlation - 1) ** 2 if i == j else kappa * correlation**2)
    return total


@pytest.mark.parametrize(("rows", "width", "kappa"), [(5, 3, 0.2), (3, 7, 0.01), (12, 2, 0.0)])
def test_equals_the_formula(rows: int, width: int, kappa: float) -> None:
    inputs = torch.randn(rows, width, dtype=torch.float64), torch.randn(rows, width, dtype=torch.float64)
    assert_equal_with_gradients(lambda s, t: rsd_loss(s, t, kappa=kappa), lambda s, t: restated(s, t, kappa), inputs)


def test_the_student_is_projected() -> None:
    first, norm, last = nn.Linear(3, 9, bias=False), random_norm(nn.BatchNorm1d(9)), nn.Linear(9, 5, bias=False)
    projector = nn.Sequential(first, norm, nn.GELU(), last).double()
    inputs = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)

    def projected(s: Tensor, t: Tensor) -> Tensor:
        hidden = s @ first.weight.T
        mean = hidden.mean(0)
        scale, shift = norm.parameters()
        hidden = (hidden - mean) / (((hidden - mean) ** 2).mean(0) + 1e-5) ** 0.5 * scale + shift
        active = hidden * (1 + torch.erf(hidden / sqrt(2))) / 2
        return 0.3 * restated(active @ last.weight.T, t, 0.05)

    assert_equal_with_gradients(
        lambda s, t: rsd_projector_loss(s, t, projector=projector, kappa=0.05, expansion=3, weight=0.3),
        projected,
        inputs,
        list(projector.parameters()),
    )


def test_shifts_and_factors_change_nothing_and_equality_is_the_least() -> None:
    student, teacher = torch.randn(64, 3, dtype=torch.float64), torch.randn(64, 3, dtype=torch.float64)
    changed = rsd_loss(5 * student + 3, teacher - 2)
    torch.testing.assert_close(changed, rsd_loss(student, teacher), rtol=1e-4, atol=0)
    assert rsd_loss(teacher, teacher, kappa=0.0) < 1e-8
    assert rsd_loss(teacher[:, [1, 2, 0]], teacher) > 2


def test_another_expansion_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"^With expansion=2 and embeddings of 3 the projector starts with 6 units, got 5; build it so, or leave "
        r"expansion out\.$",
    ):
        rsd_projector_loss(torch.rand(4, 3), torch.rand(4, 5), projector=nn.Linear(3, 5), expansion=2)


def test_the_class_projects_each_layer_and_is_saved_and_rebuilt() -> None:
    def loss() -> RSDLoss:
        made = RSDLoss(student_layers=["a", "b"], teacher_layers=["c", "d"], expansion=3)
        made.build(student, teacher)
        return made

    student, teacher = random_outputs(4, a=(3,), b=(5, 2, 2)), random_outputs(4, c=(6, 4, 4), d=(7, 2))
    first, second = loss(), loss()
    shapes = [tuple(value.shape) for value in first.state_dict().values() if value.dim() == 2]
    assert shapes == [(9, 3), (6, 9), (15, 5), (2, 15)]
    second.load_state_dict(first.state_dict())
    assert first.eval()(student, teacher, LABELS) == second.eval()(student, teacher, LABELS)
    first.train()
    vectors = student.features["b"].mean((2, 3)), teacher.features["d"].mean(1)
    terms = [
        rsd_projector_loss(student.features["a"], teacher.features["c"].mean((2, 3)), projector=first.projectors[0]),
        rsd_projector_loss(*vectors, projector=first.projectors[1]),
    ]
    torch.testing.assert_close(first(student, teacher, LABELS), torch.stack(terms).sum())


@pytest.mark.parametrize("options", [{"kappa": -0.1}, {"expansion": 0}])
def test_arguments_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^kappa must be >= 0 and expansion >= 1, got "):
        RSDLoss(**options)


def test_defaults_are_the_published_ones() -> None:
    loss = RSDLoss()
    assert (loss.weight, loss.kappa, loss.expansion, loss.gather) == (0.1, 0.01, 2, True)
