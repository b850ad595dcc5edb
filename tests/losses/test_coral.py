import numpy as np
import pytest
import torch
from random_inputs import random_rotation
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses import CoralLoss, coral_loss

_LABELS = torch.full((5,), -1)


def pair(m: int = 5, n: int = 7, width: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(m, width, dtype=torch.float64), 2 * torch.randn(n, width, dtype=torch.float64)


@pytest.mark.parametrize("sizes", [(5, 7, 3), (4, 4, 6), (2, 9, 1)], ids=str)
def test_matches_numpys_covariances(sizes: tuple[int, int, int]) -> None:
    source, target = pair(*sizes)
    difference = np.cov(source.numpy(), rowvar=False) - np.cov(target.numpy(), rowvar=False)
    expected = (difference**2).sum() / (4 * sizes[2] ** 2)
    assert coral_loss(source, target).item() == pytest.approx(expected, rel=1e-10)


def test_a_value_by_hand() -> None:
    """Variances 2 and 8, and a covariance of 4."""
    source, target = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [5.0, 2.0]])
    assert coral_loss(source, target).item() == pytest.approx((6**2 + 2 * 4**2 + 2**2) / 16)


def test_gradients_pass_gradcheck() -> None:
    assert torch.autograd.gradcheck(coral_loss, [features.requires_grad_() for features in pair(3, 4, 2)])


def test_is_zero_for_equal_covariances_and_symmetric() -> None:
    source, target = pair()
    assert coral_loss(source, source.flip(0) + 3).item() == pytest.approx(0, abs=1e-12)
    assert coral_loss(source, target) > 1e-2
    torch.testing.assert_close(coral_loss(target, source), coral_loss(source, target))


def test_invariant_to_shifts_and_a_common_rotation_and_scales_with_the_fourth_power() -> None:
    source, target = pair()
    loss = coral_loss(source, target)
    rotation = random_rotation(3)
    torch.testing.assert_close(coral_loss(source @ rotation + 1, target @ rotation - 2), loss)
    torch.testing.assert_close(coral_loss(3 * source, 3 * target), 81 * loss)
    assert not torch.isclose(coral_loss(source @ rotation, target), loss, rtol=1e-3)


def test_a_single_sample_has_zero_covariance() -> None:
    source, target = pair(1, 7)
    expected = (np.cov(target.numpy(), rowvar=False) ** 2).sum() / 36
    assert coral_loss(source, target).item() == pytest.approx(expected)
    assert coral_loss(source, target[:1]) == 0


def test_refuses_different_widths() -> None:
    with pytest.raises(ValueError, match="got 3 numbers per sample of the source and 12 per sample of the target"):
        coral_loss(torch.randn(5, 3), torch.randn(5, 3, 2, 2))


def test_the_module_averages_maps_and_sums_layers() -> None:
    loss = CoralLoss()
    assert (loss.weight, loss.warmup_epochs, loss.layers, loss.gather) == (1.0, 0, ("avgpool",), True)
    loss = CoralLoss(weight=2.0, layers=["a", "b"], warmup_epochs=2)
    source = Outputs(torch.randn(5, 2), {"a": torch.randn(5, 3, 4, 2), "b": torch.randn(5, 6)})
    target = Outputs(torch.randn(4, 2), {"a": torch.randn(4, 3, 4, 2), "b": torch.randn(4, 6)})
    expected = coral_loss(source.features["a"].mean((2, 3)), target.features["a"].mean((2, 3)))
    expected += coral_loss(source.features["b"], target.features["b"])
    torch.testing.assert_close(loss(source, target, _LABELS), expected)
    assert (loss.weight, loss.weight_at(0)) == (2.0, 1.0)
    assert loss.state_dict() == {}
