from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from random_inputs import Array, random_labels, random_logits
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses import (
    SKDLoss,
    skd_direction_loss,
    skd_direction_masked_loss,
    skd_direction_torchdistill_loss,
    skd_instance_loss,
    skd_instance_masked_loss,
    skd_instance_torchdistill_loss,
    skd_loss,
)

SHAPES = [(2, 2), (3, 4), (6, 5), (4, 30)]


def plain_instance(student: Array, teacher: Array) -> Array:
    """Return KL at temperature 2.5 of each row."""
    pairs = zip(student / 2.5, teacher / 2.5, strict=True)
    return np.array([rel_entr(softmax(t), softmax(s)).sum() for s, t in pairs])


def plain_direction(student: Array, teacher: Array, tikhonov: float, divisor: int) -> float:
    def cosines(logits: Array) -> Array:
        rows = [row / np.sqrt(row @ row) for row in logits]
        return np.array([[a @ b for b in rows] for a in rows])

    difference = (cosines(student) - cosines(teacher)) / divisor
    inverse = np.linalg.inv(np.cov(difference, rowvar=False) + tikhonov * np.eye(len(student)))
    return float(np.mean([np.sqrt(row @ inverse @ row) for row in difference]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tikhonov", [1e-4, 0.1, 2.0])
def test_matches_the_published_formula(shape: tuple[int, int], tikhonov: float) -> None:
    (student, teacher), labels = random_logits(*shape), random_labels(*shape)
    s, t, half = student.numpy(), teacher.numpy(), [-(-n // 2) / n for n in shape]
    rows = plain_instance(s, t)
    direction = plain_direction(s, t, tikhonov, shape[1])
    mistakes = [log_softmax(row)[y] for row, y in zip(s, labels.tolist(), strict=True) if y >= 0]
    expected = {
        skd_instance_loss(student, teacher, temperature=2.5): 6.25 * rows.mean(),
        skd_instance_torchdistill_loss(student, teacher, temperature=2.5): rows.mean(),
        skd_direction_loss(student, teacher, tikhonov=tikhonov): direction,
        skd_direction_torchdistill_loss(student, teacher, tikhonov=tikhonov): plain_direction(s, t, tikhonov, 1),
        skd_instance_masked_loss(student, teacher, temperature=2.5, kd_weight=0.7): 0.7 * half[0] * 6.25 * rows.mean(),
        skd_direction_masked_loss(student, teacher, tikhonov=tikhonov, kd_weight=0.7): 0.7 * half[1] * direction,
        skd_loss(student, teacher, labels, temperature=2.5, tikhonov=tikhonov, ce_weight=0.3, kd_weight=0.7): (
            0.7 * (half[0] * 6.25 * rows.mean() + half[1] * direction) - 0.3 * np.mean(mistakes)
        ),
    }
    for value, number in expected.items():
        assert value.item() == pytest.approx(number, rel=1e-8)


@pytest.mark.parametrize(
    "loss",
    [
        skd_instance_loss,
        lambda s, t: skd_direction_loss(s, t, tikhonov=1e-3),
        skd_direction_torchdistill_loss,
        lambda s, t: skd_instance_masked_loss(s, t, corrected=True),
    ],
)
def test_gradients_pass_gradcheck(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    student, teacher = random_logits(4, 3)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student.requires_grad_())


@pytest.mark.parametrize("loss", [skd_direction_loss, skd_direction_torchdistill_loss])
def test_directions_ignore_the_lengths_of_logits_and_a_common_rotation(loss: Callable[..., Tensor]) -> None:
    student, teacher = random_logits(6, 5)
    value = loss(student, teacher)
    factors = torch.rand(2, 6, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(loss(factors[0] * student, factors[1] * teacher), value)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    torch.testing.assert_close(loss(student @ turn, teacher), value)
    assert value > 0.01


def test_at_the_published_weight_the_covariance_has_no_effect() -> None:
    student, teacher = random_logits(64, 100)
    unit = [z / z.norm(dim=1, keepdim=True) for z in (student, teacher)]
    lengths = ((unit[0] @ unit[0].T - unit[1] @ unit[1].T) / 100).norm(dim=1)
    torch.testing.assert_close(skd_direction_loss(student, teacher), lengths.mean() / 0.1**0.5, rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", [skd_direction_loss, skd_direction_torchdistill_loss])
def test_equal_directions_give_0_and_no_gradient(loss: Callable[..., Tensor]) -> None:
    student = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    value = loss(student, student.detach())
    value.backward()
    assert value == 0
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_a_corrected_mask_selects_the_samples_of_which_the_teacher_is_less_confident() -> None:
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[9.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 2.0, 0, 0]], dtype=torch.float64)
    value = skd_instance_masked_loss(student, teacher, kd_weight=1.0, corrected=True)
    kept = skd_instance_loss(student[1:], teacher[1:])
    torch.testing.assert_close(value, 2 / 3 * kept)


def test_the_module_passes_its_options_and_reads_no_labels() -> None:
    student, teacher = random_logits(7, 5)
    labels = torch.full((7,), -1)
    loss = SKDLoss(temperature=2.5, tikhonov=0.01, corrected=True, weight=0.7, warmup_epochs=2)
    expected = skd_loss(
        student, teacher, labels, temperature=2.5, tikhonov=0.01, ce_weight=0.0, kd_weight=1.0, corrected=True
    )
    torch.testing.assert_close(loss(Outputs(student), Outputs(teacher), labels), expected)
    assert (loss.weight, loss.weight_at(0)) == (0.7, 0.35)


def test_defaults_match_the_released_code() -> None:
    loss = SKDLoss()
    assert (loss.weight, loss.temperature, loss.tikhonov, loss.corrected) == (0.9, 4.0, 0.1, False)
    assert (loss.gather, loss.compares_logits, loss.warmup_epochs, loss.views) == (True, True, 0, 1)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"tikhonov": -1.0}])
def test_invalid_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^temperature and tikhonov must be above 0, got "):
        SKDLoss(**options)
