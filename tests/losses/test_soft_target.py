import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses import SoftTargetLoss, soft_target_loss


def pair(rows: int = 6, classes: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    student, teacher = 3 * torch.randn(2, rows, classes, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_matches_scipy(temperature: float) -> None:
    student, teacher = pair()
    p, q = (softmax(z.numpy() / temperature, axis=1) for z in (teacher, student))
    expected = temperature**2 * rel_entr(p, q).sum() / 6
    assert soft_target_loss(student, teacher, temperature=temperature).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_matches_the_double_sum(temperature: float) -> None:
    student, teacher = pair(4, 3)
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = ([math.exp(x / temperature) for x in z] for z in (t, s))
        for a, b in zip(p, q, strict=True):
            total += a / sum(p) * (math.log(a / sum(p)) - math.log(b / sum(q)))
    assert soft_target_loss(student, teacher, temperature=temperature).item() == pytest.approx(
        temperature**2 * total / 4, abs=1e-12
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_standardize_matches_z_scores_in_numpy(temperature: float) -> None:
    student, teacher = pair()
    p, q = (
        softmax((z - z.mean(1, keepdims=True)) / (z.std(1, ddof=1, keepdims=True) + 1e-7) / temperature, axis=1)
        for z in (teacher.numpy(), student.numpy())
    )
    expected = temperature**2 * np.sum(p * np.log(p / q)) / 6
    loss = soft_target_loss(student, teacher, temperature=temperature, standardize=True)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_differs_from_cross_entropy_by_the_teachers_entropy() -> None:
    student, teacher = pair()
    student.requires_grad_()
    soft = (teacher / 4).softmax(1)
    cross_entropy = 16 * torch.nn.functional.cross_entropy(student / 4, soft)
    entropy = -16 * (soft * soft.log()).sum(1).mean()
    loss = soft_target_loss(student, teacher, temperature=4.0)
    torch.testing.assert_close(loss, cross_entropy - entropy)
    torch.testing.assert_close(
        torch.autograd.grad(loss, student)[0], torch.autograd.grad(cross_entropy, student)[0], atol=1e-12, rtol=1e-9
    )


@pytest.mark.parametrize("standardize", [False, True])
def test_is_zero_at_equality_and_positive_elsewhere(standardize: bool) -> None:
    student, teacher = pair()
    same = teacher.clone().requires_grad_()
    loss = soft_target_loss(same, teacher, temperature=4.0, standardize=standardize)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(same.grad, torch.zeros_like(teacher))
    assert soft_target_loss(student, teacher, temperature=4.0, standardize=standardize) > 0.01


@pytest.mark.parametrize("standardize", [False, True])
def test_invariant_to_a_constant_added_to_a_row(standardize: bool) -> None:
    student, teacher = pair()
    shift = 10 * torch.randn(2, 6, 1, dtype=torch.float64)
    shifted = soft_target_loss(student + shift[0], teacher + shift[1], temperature=2.0, standardize=standardize)
    torch.testing.assert_close(shifted, soft_target_loss(student, teacher, temperature=2.0, standardize=standardize))


def test_logits_and_temperature_scale_together() -> None:
    student, teacher = pair()
    scaled = soft_target_loss(3 * student, 3 * teacher, temperature=12.0)
    torch.testing.assert_close(scaled, 9 * soft_target_loss(student, teacher, temperature=4.0))


def test_standardize_is_invariant_to_the_scale_of_a_row() -> None:
    student, teacher = pair()
    factors = torch.rand(2, 6, 1, dtype=torch.float64) + 0.5
    scaled = soft_target_loss(factors[0] * student, factors[1] * teacher, temperature=2.0, standardize=True)
    torch.testing.assert_close(
        scaled, soft_target_loss(student, teacher, temperature=2.0, standardize=True), rtol=1e-5, atol=1e-6
    )
    assert soft_target_loss(2 * teacher + 1, teacher, temperature=2.0, standardize=True).item() == pytest.approx(
        0, abs=1e-12
    )


def test_a_high_temperature_gives_the_squared_error_of_centred_logits() -> None:
    """Hinton et al., section 2.1, which explains the factor T^2."""
    student, teacher = pair()
    student.requires_grad_()
    difference = student - teacher
    limit = (difference - difference.mean(1, keepdim=True)).square().sum(1).mean() / (2 * 5)
    loss = soft_target_loss(student, teacher, temperature=1e4)
    torch.testing.assert_close(loss, limit, rtol=1e-2, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, student)[0], torch.autograd.grad(limit, student)[0], rtol=1e-2, atol=1e-3
    )


def test_is_the_mean_over_the_batch() -> None:
    student, teacher = pair()
    rows = [soft_target_loss(student[[i]], teacher[[i]], temperature=4.0) for i in range(6)]
    torch.testing.assert_close(soft_target_loss(student, teacher, temperature=4.0), torch.stack(rows).mean())


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, standardize: bool) -> None:
    student, teacher = pair(dtype=dtype)
    loss = soft_target_loss(student, teacher, temperature=4.0, standardize=standardize)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, soft_target_loss(student.float(), teacher.float(), temperature=4.0, standardize=standardize)
    )
    mixed = soft_target_loss(student.float(), teacher, temperature=4.0, standardize=standardize)
    torch.testing.assert_close(mixed, loss)


def test_float64_is_kept() -> None:
    for standardize in (False, True):
        assert soft_target_loss(*pair(), temperature=4.0, standardize=standardize).dtype == torch.float64


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_saturated_logits_give_finite_values(dtype: torch.dtype, standardize: bool, temperature: float) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, 1e4, -1e4]], dtype=dtype)
    loss = soft_target_loss(student, teacher, temperature=temperature, standardize=standardize)
    loss.backward()
    assert loss.isfinite()
    assert loss > 0
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("standardize", [False, True])
def test_constant_rows_have_a_finite_gradient(standardize: bool) -> None:
    student = torch.tensor([[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]], requires_grad=True)
    soft_target_loss(
        student, torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]), temperature=2.0, standardize=standardize
    ).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("standardize", [False, True])
def test_the_gradient_passes_gradcheck(standardize: bool) -> None:
    student, teacher = pair()
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: soft_target_loss(z, teacher, temperature=4.0, standardize=standardize), (student,)
    )


def test_the_module_trains_only_the_student() -> None:
    student, teacher = pair()
    student.requires_grad_()
    teacher.requires_grad_()
    loss = SoftTargetLoss(temperature=3.0, weight=0.7, standardize=True)
    term = loss(Outputs(student), Outputs(teacher.detach()), torch.full((6,), -1))
    torch.testing.assert_close(term, soft_target_loss(student, teacher, temperature=3.0, standardize=True))
    term.backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert loss.weight == 0.7


def test_labels_are_ignored() -> None:
    student, teacher = pair()
    loss = SoftTargetLoss()
    one, other = (loss(Outputs(student), Outputs(teacher), torch.full((6,), label)) for label in (-1, 3))
    assert one == other == soft_target_loss(student, teacher, temperature=4.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_refuses_a_temperature_that_is_not_above_zero(temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"^temperature must be above 0, got {temperature}\.$"):
        SoftTargetLoss(temperature=temperature)


def test_refuses_a_negative_weight() -> None:
    with pytest.raises(ValueError, match="weight must be >= 0"):
        SoftTargetLoss(weight=-0.1)
