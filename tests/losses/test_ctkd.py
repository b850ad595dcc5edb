import math
from typing import Any

import numpy as np
import pytest
import torch
from random_inputs import random_logits
from scipy.special import rel_entr, softmax
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses import CTKDLoss, ctkd_lambda, ctkd_loss, soft_target_loss

OPTIONS: dict[str, Any] = {"t_start": 0.5, "t_end": 7.0}


@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (5, 4), (3, 50)])
@pytest.mark.parametrize("number", [-2.0, 0.0, 1.5])
def test_matches_the_published_formula(rows: int, classes: int, number: float) -> None:
    student, teacher = random_logits(rows, classes)
    value = ctkd_loss(student, teacher, global_T=torch.tensor([number]).double(), lambda_=-0.3, **OPTIONS)
    temperature = 0.5 + 7 / (1 + math.exp(-number))
    pairs = zip(student.numpy() / temperature, teacher.numpy() / temperature, strict=True)
    expected = temperature**2 * np.mean([rel_entr(softmax(t), softmax(s)).sum() for s, t in pairs])
    assert value.shape == ()
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_the_students_gradient_passes_gradcheck_and_the_temperatures_is_multiplied() -> None:
    student, teacher = random_logits(3, 4)
    student.requires_grad_()
    number = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)

    def loss(student: Tensor, number: Tensor, factor: float = 1.0) -> Tensor:
        return ctkd_loss(student, teacher, global_T=number, lambda_=factor, **OPTIONS)

    assert torch.autograd.gradcheck(loss, (student, number))
    plain = torch.autograd.grad(loss(student, number), (student, number))
    for factor in (-1.0, -0.25, torch.tensor(-0.25, dtype=torch.float64)):
        scaled = torch.autograd.grad(
            ctkd_loss(student, teacher, global_T=number, lambda_=factor, **OPTIONS), (student, number)
        )
        torch.testing.assert_close(scaled[0], plain[0])
        torch.testing.assert_close(scaled[1], float(factor) * plain[1])


def test_a_step_down_the_gradient_makes_the_task_harder() -> None:
    student, teacher = random_logits(6, 5)
    number = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    before = ctkd_loss(student, teacher, global_T=number, lambda_=-1.0)
    (gradient,) = torch.autograd.grad(before, number)
    assert ctkd_loss(student, teacher, global_T=number - 0.1 * gradient.sign(), lambda_=-1.0) > before


def test_equals_the_soft_target_loss_at_its_temperature() -> None:
    student, teacher = random_logits(6, 5)
    value = ctkd_loss(student, teacher, global_T=torch.zeros(1).double(), lambda_=-1.0)
    torch.testing.assert_close(value, soft_target_loss(student, teacher, temperature=11.0))


@pytest.mark.parametrize("epochs", [1, 5, 10])
def test_the_factor_falls_from_almost_0_to_minus_1(epochs: int) -> None:
    counted_from_one = [-(1 - math.cos(math.pi * e / epochs)) / 2 for e in range(1, epochs + 1)]
    found = ctkd_lambda(torch.arange(epochs + 2), epochs=epochs)
    assert found.tolist() == pytest.approx([*counted_from_one, -1, -1], abs=1e-6)


def test_the_module_passes_its_options_and_follows_the_epoch() -> None:
    student, teacher = random_logits(6, 5)
    loss = CTKDLoss(lambda_epochs=4, weight=0.7, warmup_epochs=2, **OPTIONS).double()
    gradients = []
    for epoch in (0, 3, 50):
        loss.epoch = torch.tensor(epoch)
        value = loss(Outputs(student), Outputs(teacher), torch.full((6,), -1))
        expected = ctkd_loss(student, teacher, global_T=torch.ones(1).double(), lambda_=1.0, **OPTIONS)
        torch.testing.assert_close(value, expected)
        gradients.append(torch.autograd.grad(value, loss.global_T)[0])
    torch.testing.assert_close(gradients[1], gradients[2])
    torch.testing.assert_close(gradients[0], gradients[1] * (1 - math.cos(math.pi / 4)) / 2)
    assert loss.metrics["temperature"].item() == pytest.approx(0.5 + 7 / (1 + math.exp(-1)), rel=1e-6)
    assert not loss.metrics["temperature"].requires_grad
    assert (loss.weight, loss.weight_at(0)) == (0.7, 0.35)


def test_defaults_match_the_released_code() -> None:
    loss = CTKDLoss()
    assert (loss.weight, loss.t_start, loss.t_end, loss.lambda_epochs) == (0.9, 1.0, 20.0, 10)
    assert {name: value.tolist() for name, value in loss.state_dict().items()} == {"global_T": [1.0]}
    assert loss.compares_logits
    assert loss.warmup_epochs == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_start": 0.0}, r"^t_start and t_end must be above 0, got 0\.0 and 20\.0\.$"),
        ({"t_end": -1.0}, "must be above 0, got 1.0 and -1.0"),
        ({"lambda_epochs": 0}, r"^lambda_epochs must be >= 1, got 0\.$"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CTKDLoss(**options)
