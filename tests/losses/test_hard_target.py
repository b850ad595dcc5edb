import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses import HardTargetLoss, hard_target_loss
from kd_lightning.losses.hard_target import row_weights


def logits(rows: int = 6, classes: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(rows, classes, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_matches_scipy(smoothing: float) -> None:
    z, labels = logits(), torch.tensor([0, 4, 2, 2, 1, 3])
    targets = (1 - smoothing) * F.one_hot(labels, 5).numpy() + smoothing / 5
    expected = -(targets * log_softmax(z.numpy(), axis=1)).sum() / 6
    assert hard_target_loss(z, labels, label_smoothing=smoothing).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_unlabelled_rows_are_ignored(smoothing: float) -> None:
    z, labels = logits().requires_grad_(), torch.tensor([0, -1, 2, -1, -1, 3])
    loss = hard_target_loss(z, labels, label_smoothing=smoothing)
    kept = labels >= 0
    torch.testing.assert_close(loss, F.cross_entropy(z[kept], labels[kept], label_smoothing=smoothing))
    loss.backward()
    assert z.grad is not None
    assert (z.grad[~kept] == 0).all()
    assert (z.grad[kept] != 0).all()


def test_is_zero_without_labels() -> None:
    z = logits().requires_grad_()
    loss = hard_target_loss(z, torch.full((6,), -1))
    loss.backward()
    assert loss.item() == 0
    assert (z.grad == 0).all()  # type: ignore[union-attr]


def test_accepts_probabilities_as_labels() -> None:
    z, targets = logits(), torch.rand(6, 5).softmax(1)
    expected = -(targets.double() * z.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(hard_target_loss(z, targets), expected)
    labels = torch.tensor([0, 4, 2, 2, 1, 3])
    for smoothing in (0.0, 0.2):
        one_hot = hard_target_loss(z, F.one_hot(labels, 5).float(), label_smoothing=smoothing)
        torch.testing.assert_close(one_hot, hard_target_loss(z, labels, label_smoothing=smoothing))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("factor", [1.0, 5.0])
def test_weights_give_a_weighted_mean(smoothing: float, factor: float) -> None:
    z, weights = logits(), torch.tensor([0.0, 3.0, 0.5, 1.0, 1.0, 2.0], dtype=torch.float64)
    labels = torch.tensor([0, 4, -1, 2, 1, 3])
    kept = labels >= 0
    errors = F.cross_entropy(z[kept], labels[kept], label_smoothing=smoothing, reduction="none")
    expected = (weights[kept] * errors).sum() / weights[kept].sum()
    torch.testing.assert_close(
        hard_target_loss(z, labels, label_smoothing=smoothing, weights=factor * weights), expected
    )
    targets = torch.rand(6, 5).softmax(1)
    errors = F.cross_entropy(z, targets.double(), label_smoothing=smoothing, reduction="none")
    expected = (weights * errors).sum() / weights.sum()
    torch.testing.assert_close(
        hard_target_loss(z, targets, label_smoothing=smoothing, weights=factor * weights), expected
    )


def test_equal_weights_change_nothing_and_zero_weights_give_zero() -> None:
    z, labels = logits().requires_grad_(), torch.tensor([0, 4, -1, 2, 1, 3])
    for target in (labels, torch.rand(6, 5).softmax(1), torch.full((6,), -1)):
        torch.testing.assert_close(
            hard_target_loss(z, target, weights=torch.full((6,), 0.3)), hard_target_loss(z, target)
        )
        loss = hard_target_loss(z, target, weights=torch.zeros(6))
        (gradient,) = torch.autograd.grad(loss, z)
        assert loss == 0
        assert (gradient == 0).all()


def test_invariant_to_a_constant_added_to_a_row() -> None:
    z, labels = logits(), torch.tensor([0, 4, 2, -1, 1, 3])
    shifted = z + 10 * torch.randn(6, 1, dtype=torch.float64)
    torch.testing.assert_close(hard_target_loss(shifted, labels), hard_target_loss(z, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z, labels = logits(dtype=dtype), torch.tensor([0, 4, 2, 2, 1, 3])
    loss = hard_target_loss(z, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(z.float(), labels))
    targets = torch.rand(6, 5).softmax(1).to(dtype)
    torch.testing.assert_close(hard_target_loss(z, targets), F.cross_entropy(z.float(), targets.float()))


def test_float64_is_kept() -> None:
    assert hard_target_loss(logits(), torch.zeros(6, dtype=torch.long)).dtype == torch.float64
    assert hard_target_loss(logits(), torch.rand(6, 5)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_saturated_logits_give_finite_values(dtype: torch.dtype, smoothing: float) -> None:
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    loss = hard_target_loss(z, torch.tensor([1, 0]), label_smoothing=smoothing)
    loss.backward()
    assert loss.isfinite()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_the_gradient_is_the_difference_of_probabilities() -> None:
    z, labels = logits().requires_grad_(), torch.tensor([0, 4, 2, 2, 1, 3])
    hard_target_loss(z, labels).backward()
    torch.testing.assert_close(z.grad, (z.softmax(1) - F.one_hot(labels, 5)).detach() / 6)
    assert torch.autograd.gradcheck(lambda x: hard_target_loss(x, labels, label_smoothing=0.1), (z,))


def test_the_module_reads_only_the_students_logits() -> None:
    student, teacher = logits().requires_grad_(), logits().requires_grad_()
    labels = torch.tensor([0, 4, -1, 2, 1, 3])
    loss = HardTargetLoss(weight=0.3, label_smoothing=0.1)
    term = loss(Outputs(student), Outputs(teacher), labels)
    torch.testing.assert_close(
        term, hard_target_loss(student, labels, label_smoothing=0.1)
    )  # the weight is applied by the caller
    term.backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert loss.weight == 0.3


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan")])
def test_refuses_a_smoothing_outside_its_range(smoothing: float) -> None:
    with pytest.raises(ValueError, match=rf"^label_smoothing must be in \[0, 1\], got {smoothing}\.$"):
        HardTargetLoss(label_smoothing=smoothing)


def test_refuses_a_negative_weight() -> None:
    with pytest.raises(ValueError, match="weight must be >= 0"):
        HardTargetLoss(weight=-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_of_minus_one_among_probabilities_are_left_out(smoothing: float) -> None:
    z = logits().requires_grad_()
    targets = torch.rand(6, 5, dtype=z.dtype).softmax(1)
    targets[[1, 4]] = -1
    rest = [0, 2, 3, 5]
    loss = hard_target_loss(z, targets, label_smoothing=smoothing)
    torch.testing.assert_close(loss, F.cross_entropy(z[rest], targets[rest], label_smoothing=smoothing))
    loss.backward()
    assert z.grad is not None
    assert (z.grad[[1, 4]] == 0).all()
    nothing = hard_target_loss(z, torch.full_like(targets, -1), label_smoothing=smoothing)
    assert nothing == 0


# --- weights of the classes


def test_class_weights_are_those_of_torch() -> None:
    z, labels, weights = logits(), torch.tensor([0, 4, 2, 2, -1, 3]), torch.tensor([1.0, 2.0, 0.5, 3.0, 0.0])
    expected = F.cross_entropy(z, labels, weight=weights.double(), ignore_index=-1)
    found = hard_target_loss(z, labels, weights=row_weights(labels, weights.double()))
    torch.testing.assert_close(found, expected)
    loss = HardTargetLoss()
    loss.class_weights = weights.double()
    torch.testing.assert_close(loss(Outputs(z, {}), None, labels), expected)


def test_rows_of_probabilities_have_the_expected_weight() -> None:
    probabilities = torch.tensor([[0.25, 0.75], [1.0, 0.0], [-1.0, -1.0]])
    assert row_weights(probabilities, torch.tensor([2.0, 4.0])).tolist() == [3.5, 2.0, 0.0]
    indices = torch.tensor([1, 0])
    one_hot = F.one_hot(indices, 5).double()
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.0]).double()
    z = logits(rows=2)
    torch.testing.assert_close(
        hard_target_loss(z, one_hot, weights=row_weights(one_hot, weights)),
        hard_target_loss(z, indices, weights=row_weights(indices, weights)),
    )
