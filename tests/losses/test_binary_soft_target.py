import pytest
import torch
from random_inputs import random_logits
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

from kd_lightning.features import Outputs
from kd_lightning.losses import BinarySoftTargetLoss, binary_soft_target_loss, binary_target_loss, soft_target_loss


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_matches_the_divergence_of_bernoulli_distributions(temperature: float) -> None:
    student, teacher = random_logits(6, 5)
    expected = kl_divergence(Bernoulli(logits=teacher / temperature), Bernoulli(logits=student / temperature))
    torch.testing.assert_close(
        binary_soft_target_loss(student, teacher, temperature=temperature), temperature**2 * expected.sum() / 6
    )


def released(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the formula of the released MLD: of clamped probabilities, summed over classes, a mean over rows."""
    p, q = (values.sigmoid().clamp(1e-8, 1 - 1e-8) for values in (teacher, student))
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum() / len(student)


def test_matches_the_released_formula() -> None:
    student, teacher = random_logits(6, 5)
    torch.testing.assert_close(
        binary_soft_target_loss(student, teacher, temperature=1.0), released(student, teacher), rtol=1e-6, atol=0
    )


def test_is_the_softmax_divergence_of_each_class_and_its_absence() -> None:
    student, teacher = random_logits(6, 5)
    total = torch.zeros((), dtype=torch.float64)
    for c in range(5):
        pairs = (torch.stack([z[:, c], torch.zeros(6, dtype=torch.float64)], 1) for z in (student, teacher))
        total += soft_target_loss(*pairs, temperature=3.0)
    torch.testing.assert_close(binary_soft_target_loss(student, teacher, temperature=3.0), total)


def test_differs_from_the_cross_entropy_by_the_teachers_entropy_which_has_no_gradient() -> None:
    student, teacher = random_logits(6, 5)
    student.requires_grad_()
    probabilities = teacher.sigmoid()
    soft = binary_soft_target_loss(student, teacher, temperature=1.0)
    hard = binary_target_loss(student, probabilities)
    torch.testing.assert_close(soft, hard - binary_target_loss(teacher, probabilities))
    for one, other in zip(torch.autograd.grad(soft, student), torch.autograd.grad(hard, student), strict=True):
        torch.testing.assert_close(one, other)


def test_is_zero_at_equality_and_positive_elsewhere() -> None:
    student, teacher = random_logits(6, 5)
    same = teacher.clone().requires_grad_()
    loss = binary_soft_target_loss(same, teacher, temperature=4.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(same.grad, torch.zeros_like(teacher))
    assert binary_soft_target_loss(student, teacher, temperature=4.0) > 0.01


def test_logits_and_temperature_scale_together() -> None:
    student, teacher = random_logits(6, 5)
    scaled = binary_soft_target_loss(3 * student, 3 * teacher, temperature=12.0)
    torch.testing.assert_close(scaled, 9 * binary_soft_target_loss(student, teacher, temperature=4.0))


def test_a_high_temperature_gives_the_squared_error_of_the_logits() -> None:
    student, teacher = random_logits(6, 5)
    limit = (student - teacher).square().sum() / (8 * 6)
    torch.testing.assert_close(binary_soft_target_loss(student, teacher, temperature=1e4), limit, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = (z.to(dtype) for z in random_logits(6, 5))
    loss = binary_soft_target_loss(student, teacher, temperature=4.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, binary_soft_target_loss(student.float(), teacher.float(), temperature=4.0))


def test_float64_is_kept_and_the_gradient_passes_gradcheck() -> None:
    student, teacher = random_logits(6, 5)
    assert binary_soft_target_loss(student, teacher, temperature=2.0).dtype == torch.float64
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: binary_soft_target_loss(z, teacher, temperature=2.0), (student,))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_saturated_logits_give_finite_values(dtype: torch.dtype, temperature: float) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, 1e4, -1e4]], dtype=dtype)
    loss = binary_soft_target_loss(student, teacher, temperature=temperature)
    loss.backward()
    assert loss.isfinite()
    assert loss > 0
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_the_module_trains_only_the_student_and_ignores_labels() -> None:
    student, teacher = random_logits(6, 5)
    student.requires_grad_(), teacher.requires_grad_()
    loss = BinarySoftTargetLoss(temperature=3.0, weight=0.7)
    one, other = (loss(Outputs(student), Outputs(teacher), torch.full((6, 5), float(y))) for y in (-1, 1))
    assert one == other == binary_soft_target_loss(student, teacher, temperature=3.0)
    one.backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert (loss.weight, loss.multi_label, loss.compares_logits) == (0.7, True, True)
    assert BinarySoftTargetLoss().temperature == 1


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_refuses_a_temperature_that_is_not_above_zero(temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"^temperature must be above 0, got {temperature}\.$"):
        BinarySoftTargetLoss(temperature=temperature)
