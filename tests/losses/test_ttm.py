import numpy as np
import pytest
import torch
from random_inputs import Array, random_logits
from scipy.special import rel_entr, softmax

from kd_lightning.features import Outputs
from kd_lightning.losses import TTMLoss, WTTMLoss, soft_target_loss, ttm_loss, wttm_loss


def plain_ttm(student: Array, teacher: Array, gamma: float) -> tuple[float, float]:
    """Return TTM and its weighted form."""
    divergences, weights = [], []
    for s, t in zip(student, teacher, strict=True):
        powers = softmax(t) ** gamma
        weights.append(powers.sum())
        divergences.append(rel_entr(powers / powers.sum(), softmax(s)).sum())
    return float(np.mean(divergences)), float(np.mean(np.multiply(weights, divergences)))


@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (2, 3), (5, 4), (6, 50)])
@pytest.mark.parametrize("gamma", [0.1, 0.6, 1.0, 1.7])
def test_matches_the_published_formula(rows: int, classes: int, gamma: float) -> None:
    student, teacher = random_logits(rows, classes)
    expected = plain_ttm(student.numpy(), teacher.numpy(), gamma)
    assert ttm_loss(student, teacher, gamma=gamma).item() == pytest.approx(expected[0], rel=1e-10)
    assert wttm_loss(student, teacher, gamma=gamma).item() == pytest.approx(expected[1], rel=1e-10)


@pytest.mark.parametrize("loss", [ttm_loss, wttm_loss])
def test_gradients_pass_gradcheck(loss: type) -> None:
    student, teacher = (logits.requires_grad_() for logits in random_logits(3, 4))
    assert torch.autograd.gradcheck(loss, (student, teacher))


def test_is_zero_where_the_student_gives_the_teachers_powers() -> None:
    _, teacher = random_logits(4, 5)
    for loss in (ttm_loss, wttm_loss):
        assert loss(0.3 * teacher + 7, teacher, gamma=0.3).item() == pytest.approx(0, abs=1e-12)
        assert loss(teacher, teacher, gamma=0.3) > 0.1


def test_equals_the_soft_target_loss_without_a_power() -> None:
    student, teacher = random_logits(4, 5)
    expected = soft_target_loss(student, teacher, temperature=1.0)
    for loss in (ttm_loss, wttm_loss):  # probabilities sum to 1
        torch.testing.assert_close(loss(student, teacher, gamma=1.0), expected)


def test_an_undecided_teacher_weighs_the_most() -> None:
    student = random_logits(1, 5)[0]
    certain, undecided = torch.tensor([[1e4, 0, 0, 0, 0]]).double(), torch.zeros(1, 5).double()
    weights = [wttm_loss(student, t, gamma=0.25) / ttm_loss(student, t, gamma=0.25) for t in (certain, undecided)]
    torch.testing.assert_close(torch.stack(weights), torch.tensor([1, 5**0.75]).double())


def test_modules_pass_their_options_and_ignore_labels() -> None:
    student, teacher = random_logits(6, 5)
    outputs, labels = (Outputs(student), Outputs(teacher)), torch.full((6,), -1)
    torch.testing.assert_close(TTMLoss(gamma=0.4)(*outputs, labels), ttm_loss(student, teacher, gamma=0.4))
    torch.testing.assert_close(WTTMLoss(gamma=0.4)(*outputs, labels), wttm_loss(student, teacher, gamma=0.4))
    assert (
        WTTMLoss(weight=0.8, warmup_epochs=4).weight_at(0) == TTMLoss(weight=0.4, warmup_epochs=2).weight_at(0) == 0.2
    )


def test_defaults_match_an_example_of_the_release() -> None:
    assert (TTMLoss().weight, TTMLoss().gamma, TTMLoss().warmup_epochs) == (45.0, 0.1, 0)
    assert (WTTMLoss().weight, WTTMLoss().gamma, WTTMLoss().warmup_epochs) == (4.0, 0.2, 0)
    assert TTMLoss().compares_logits
    assert WTTMLoss().compares_logits


@pytest.mark.parametrize("kind", [TTMLoss, WTTMLoss])
def test_a_power_that_is_not_positive_is_refused(kind: type[TTMLoss]) -> None:
    with pytest.raises(ValueError, match=r"^gamma must be above 0, got 0\.0\.$"):
        kind(gamma=0.0)
