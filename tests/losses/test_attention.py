import pytest
import torch
import torch.nn.functional as F
from random_inputs import random_maps

from kd_lightning.features import Outputs
from kd_lightning.losses import AttentionLoss, attention_loss


def test_values_by_hand() -> None:
    """Attention to one pixel of two, to the other, and to both."""
    left, right = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[0.0, 5.0]]], [[[3.0, 3.0]]]])
    assert attention_loss(left, right[:1]).item() == pytest.approx(1)
    half = 0.5**0.5
    assert attention_loss(left, right[1:]).item() == pytest.approx(((1 - half) ** 2 + half**2) / 2)
    assert attention_loss(left, right[1:], power=1).item() == pytest.approx(((1 - half) ** 2 + half**2) / 2)


@pytest.mark.parametrize("power", [1, 2, 3, 4])
def test_power_is_applied_to_the_features(power: int) -> None:
    student, teacher = (features.abs() for features in random_maps())
    expected = attention_loss(student**power, teacher**power, power=1)
    torch.testing.assert_close(attention_loss(student, teacher, power=power), expected)


def test_is_zero_at_equality_and_positive_elsewhere() -> None:
    student, teacher = random_maps()
    assert attention_loss(teacher, teacher.clone()) == 0
    assert attention_loss(student, teacher) > 1e-3


def test_invariant_to_scale_sign_and_order_of_channels() -> None:
    student, teacher = random_maps()
    loss = attention_loss(student, teacher)
    factors = torch.rand(3, 1, 1, 1, dtype=torch.float64) + 0.5
    torch.testing.assert_close(attention_loss(3 * student, factors * teacher), loss)
    torch.testing.assert_close(attention_loss(-student, teacher), loss)
    torch.testing.assert_close(attention_loss(student[:, torch.randperm(4)], teacher[:, torch.randperm(7)]), loss)
    torch.testing.assert_close(attention_loss(student.flip(3), teacher.flip(3)), loss)
    assert not torch.isclose(attention_loss(student.flip(3), teacher), loss)


def test_the_larger_map_is_average_pooled() -> None:
    student, teacher = random_maps()
    large = teacher.repeat_interleave(2, 2).repeat_interleave(3, 3) + 0.0
    torch.testing.assert_close(attention_loss(student, large), attention_loss(student, teacher))
    torch.testing.assert_close(attention_loss(large, student), attention_loss(teacher, student))
    noisy = torch.randn(3, 7, 10, 12, dtype=torch.float64)
    torch.testing.assert_close(attention_loss(student, noisy), attention_loss(student, F.avg_pool2d(noisy, 2)))


def test_the_module_passes_its_options() -> None:
    student, teacher = random_maps()
    loss = AttentionLoss(weight=2.0, student_layers=["a"], teacher_layers=["b"], power=4, warmup_epochs=2)
    outputs = Outputs(torch.randn(3, 2), {"a": student}), Outputs(torch.randn(3, 2), {"b": teacher})
    loss.build(*outputs)
    assert loss(*outputs, torch.full((3,), -1)) == attention_loss(student, teacher, power=4)
    assert (loss.weight, loss.weight_at(0)) == (2.0, 1.0)
    assert loss.state_dict() == {}


def test_defaults_match_the_released_code() -> None:
    loss = AttentionLoss()
    assert (loss.weight, loss.power, loss.warmup_epochs) == (1000.0, 2, 0)
    assert loss.student_layers == loss.teacher_layers == ("layer1", "layer2", "layer3")
    student, teacher = random_maps()
    assert attention_loss(student, teacher) == attention_loss(student, teacher, power=2)


@pytest.mark.parametrize("power", [0, -2])
def test_refuses_a_power_below_one(power: int) -> None:
    with pytest.raises(ValueError, match=rf"^power must be >= 1, got {power}\.$"):
        AttentionLoss(power=power)
