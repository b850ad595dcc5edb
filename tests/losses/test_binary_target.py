import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses import BinaryTargetLoss, binary_target_loss


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return logits and labels of six rows and five classes, of which one row is unlabelled and one has no class."""
    labels = (torch.rand(6, 5) < 0.4).float()
    labels[1], labels[4] = -1, 0
    return (3 * torch.randn(6, 5, dtype=torch.float64)).to(dtype), labels


LABELLED = torch.tensor([0, 2, 3, 4, 5])


def test_matches_torch() -> None:
    z, labels = inputs()
    targets = labels[LABELLED].double()
    expected = F.binary_cross_entropy_with_logits(z[LABELLED], targets, reduction="sum") / 5
    torch.testing.assert_close(binary_target_loss(z, labels), expected)
    torch.testing.assert_close(binary_target_loss(z[LABELLED], labels[LABELLED], all_labelled=True), expected)
    weights = torch.tensor([0.0, 0.5, 1.0, 2.0, 30.0])
    weighted = F.binary_cross_entropy_with_logits(
        z[LABELLED], targets, reduction="sum", pos_weight=weights.double()
    ) / len(LABELLED)
    torch.testing.assert_close(binary_target_loss(z, labels, positive_weights=weights), weighted)
    smooth = F.binary_cross_entropy_with_logits(z[LABELLED], 0.8 * targets + 0.1, reduction="sum") / 5
    torch.testing.assert_close(binary_target_loss(z, labels, label_smoothing=0.2), smooth)


def test_smoothing_is_that_of_timm() -> None:
    timm = pytest.importorskip("timm.loss")
    z, labels = inputs()
    z, labels = z[LABELLED], labels[LABELLED].double()
    reference = timm.BinaryCrossEntropy(smoothing=0.1, smooth_dense=True, sum_classes=True)
    torch.testing.assert_close(binary_target_loss(z, labels, label_smoothing=0.1), reference(z, labels))


def test_matches_the_double_sum() -> None:
    z, labels = inputs()
    total = 0.0
    for row in LABELLED.tolist():
        for logit, label in zip(z[row].tolist(), labels[row].tolist(), strict=True):
            probability = 1 / (1 + math.exp(-logit))
            total -= math.log(probability if label == 1 else 1 - probability)
    assert binary_target_loss(z, labels).item() == pytest.approx(total / 5, rel=1e-10)


def test_a_class_is_learned_as_if_it_were_alone() -> None:
    z, labels = inputs()
    z.requires_grad_()
    (together,) = torch.autograd.grad(binary_target_loss(z, labels), z)
    for c in range(5):
        (alone,) = torch.autograd.grad(binary_target_loss(z[:, [c]], labels[:, [c]]), z)
        torch.testing.assert_close(alone[:, c], together[:, c])


def test_fractions_lie_between_the_two_labels() -> None:
    z, _ = inputs()
    ones, zeros = torch.ones(6, 5), torch.zeros(6, 5)
    mixed = binary_target_loss(z, 0.3 * ones + 0.7 * zeros)
    torch.testing.assert_close(mixed, 0.3 * binary_target_loss(z, ones) + 0.7 * binary_target_loss(z, zeros))


def test_unlabelled_rows_have_no_influence() -> None:
    z, labels = inputs()
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(binary_target_loss(z, labels), z)
    assert (gradient[1] == 0).all()
    assert (gradient[4] > 0).all()  # it is labelled, with no class
    nothing = binary_target_loss(z, torch.full((6, 5), -1.0))
    assert nothing == 0
    assert (torch.autograd.grad(nothing, z)[0] == 0).all()


def test_the_gradient_is_the_difference_of_probabilities() -> None:
    z, labels = inputs()
    z, labels = z[LABELLED].requires_grad_(), labels[LABELLED]
    (gradient,) = torch.autograd.grad(binary_target_loss(z, labels), z)
    torch.testing.assert_close(gradient, (z.sigmoid() - labels).detach() / 5)
    assert torch.autograd.gradcheck(lambda x: binary_target_loss(x, labels, label_smoothing=0.1), (z,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z, labels = inputs(dtype)
    for target in (labels, labels.to(dtype), labels.long()):
        loss = binary_target_loss(z, target)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, binary_target_loss(z.float(), labels))


def test_float64_is_kept() -> None:
    assert binary_target_loss(*inputs(), positive_weights=torch.ones(5)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_saturated_logits_give_finite_values(dtype: torch.dtype, smoothing: float) -> None:
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    loss = binary_target_loss(z, torch.tensor([[0.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]), label_smoothing=smoothing)
    loss.backward()
    assert loss.isfinite()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_the_module_reads_only_the_students_logits_and_the_weights_of_the_classes() -> None:
    student, labels = inputs()
    student.requires_grad_()
    loss = BinaryTargetLoss(weight=0.3, label_smoothing=0.1)
    term = loss(Outputs(student), None, labels)
    torch.testing.assert_close(term, binary_target_loss(student, labels, label_smoothing=0.1))
    term.backward()
    assert student.grad is not None
    loss.class_weights = torch.arange(5.0)
    torch.testing.assert_close(
        loss(Outputs(student), None, labels),
        binary_target_loss(student, labels, label_smoothing=0.1, positive_weights=torch.arange(5.0)),
    )
    assert (loss.weight, loss.multi_label, loss.needs_teacher, loss.weighs_classes) == (0.3, True, False, True)


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan")])
def test_refuses_a_smoothing_outside_its_range(smoothing: float) -> None:
    with pytest.raises(ValueError, match=rf"^label_smoothing must be in \[0, 1\], got {re.escape(str(smoothing))}\.$"):
        BinaryTargetLoss(label_smoothing=smoothing)
