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
    MLLDLoss,
    mlld_batch_loss,
    mlld_batch_term_loss,
    mlld_class_loss,
    mlld_class_term_loss,
    mlld_instance_loss,
    mlld_loss,
)

SHAPES = [(1, 2), (2, 3), (5, 4), (4, 30)]
TEMPERATURES = (2.5, 3.0, 5.0, 2.0, 6.0)
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def four_logits(rows: int, classes: int) -> Four:
    """Return the student's weak and strong logits, and the teacher's."""
    weak, strong = random_logits(rows, classes), random_logits(rows, classes)
    return weak[0], strong[0], weak[1], strong[1]


def plain_kd(student: Array, teacher: Array, temperature: float) -> Array:
    pairs = zip(student / temperature, teacher / temperature, strict=True)
    return np.array([temperature**2 * rel_entr(softmax(t), softmax(s)).sum() for s, t in pairs])


def plain_products(logits: Array, temperature: float, over: str) -> Array:
    """Return the inner product of each two columns ("classes"), or rows ("samples"), of the probabilities."""
    rows = np.array([softmax(row / temperature) for row in logits])
    vectors = rows.T if over == "classes" else rows
    return np.array([[a @ b for b in vectors] for a in vectors])


def plain_errors(student: Array, teacher: Array, temperature: float, over: str) -> Array:
    difference = plain_products(teacher, temperature, over) - plain_products(student, temperature, over)
    return np.array([(row**2).sum() for row in difference])


def at_or_below_median(values: Array) -> Array:
    return (values <= np.percentile(values, 50)).astype(float)


def plain_terms(logits: Four, corrected: bool) -> tuple[float, float, float]:
    """Return the sums over samples, over classes and over pairs of samples."""
    s, s_strong, t, t_strong = (z.numpy() for z in logits)
    probabilities = np.array([softmax(row) for row in t])
    samples, classes = at_or_below_median(probabilities.max(1)), at_or_below_median(probabilities.sum(0))
    if not corrected:  # the masks scale only
        samples, classes = np.full(len(s), samples.mean()), np.full(s.shape[1], classes.mean())
    instance = float(sum(np.mean(samples * plain_kd(s, t, x)) for x in TEMPERATURES))
    instance += float(sum(np.mean(plain_kd(s_strong, t_strong, x)) for x in TEMPERATURES[:3]))
    again = (s_strong, t_strong) if corrected else (s, t)
    instance += float(sum(np.mean(plain_kd(*again, x)) for x in TEMPERATURES[3:]))
    over_classes = sum(np.mean(classes * plain_errors(s, t, x, "classes")) for x in TEMPERATURES)
    over_samples = sum(np.mean(samples * plain_errors(s, t, x, "samples")) for x in TEMPERATURES)
    return instance, float(over_classes), float(over_samples)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("corrected", [False, True])
def test_matches_the_published_formula(shape: tuple[int, int], corrected: bool) -> None:
    logits, labels = four_logits(*shape), random_labels(*shape)
    options: dict[str, Any] = {"temperature": 2.5, "kd_weight": 0.7, "corrected": corrected}
    expected = [0.7 * term for term in plain_terms(logits, corrected)]
    for loss, term in zip((mlld_instance_loss, mlld_class_loss, mlld_batch_loss), expected, strict=True):
        assert loss(*logits, **options).item() == pytest.approx(term, rel=1e-9)
    errors = [
        -np.mean([log_softmax(row)[y] for row, y in zip(z.numpy(), labels.tolist(), strict=True) if y >= 0])
        for z in logits[:2]
    ]
    value = mlld_loss(*logits, labels, ce_weight=0.3, **options)
    assert value.item() == pytest.approx(0.3 * sum(errors) + sum(expected), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_single_terms_match_the_published_formula(shape: tuple[int, int]) -> None:
    student, teacher = random_logits(*shape)
    for loss, over in ((mlld_class_term_loss, "classes"), (mlld_batch_term_loss, "samples")):
        expected = plain_errors(student.numpy(), teacher.numpy(), 1.7, over).mean()
        assert loss(student, teacher, temperature=1.7).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("loss", [mlld_instance_loss, mlld_class_loss, mlld_batch_loss])
@pytest.mark.parametrize("corrected", [False, True])
def test_gradients_pass_gradcheck(loss: Callable[..., Tensor], corrected: bool) -> None:
    weak, strong, *teacher = four_logits(4, 3)

    def of_student(weak: Tensor, strong: Tensor) -> Tensor:
        return loss(weak, strong, *teacher, corrected=corrected) + 0 * strong.sum()

    assert torch.autograd.gradcheck(of_student, (weak.requires_grad_(), strong.requires_grad_()))


def test_is_zero_at_equality() -> None:
    _, _, weak, strong = four_logits(4, 5)
    for loss in (mlld_instance_loss, mlld_class_loss, mlld_batch_loss):
        assert loss(weak, strong, weak, strong).item() == pytest.approx(0, abs=1e-12)


def test_order_matters_to_samples_as_a_whole_only() -> None:
    logits = four_logits(6, 5)
    rows, classes = torch.randperm(6), torch.randperm(5)
    for loss in (mlld_instance_loss, mlld_class_loss, mlld_batch_loss):
        shuffled = (z[rows][:, classes] for z in logits)
        torch.testing.assert_close(loss(*shuffled), loss(*logits))


def test_a_corrected_mask_selects_what_the_teacher_is_less_confident_of() -> None:
    weak, _ = random_logits(3, 4)
    teacher = torch.tensor([[9.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 2.0, 0, 0]], dtype=torch.float64)
    weak.requires_grad_()
    mlld_instance_loss(weak, None, teacher, None, corrected=True).backward()
    assert weak.grad is not None
    assert (weak.grad.abs().sum(1) > 0).tolist() == [False, True, True]


def _outputs(rows: int) -> tuple[Outputs, Outputs]:
    student, teacher = random_logits(rows, 5)
    return Outputs(student), Outputs(teacher)


def test_the_module_divides_two_views_of_each_sample_and_reads_no_labels() -> None:
    (student, teacher), labels = _outputs(8), torch.full((8,), -1)
    (weak, strong), (t_weak, t_strong) = (outputs.logits.chunk(2) for outputs in (student, teacher))
    loss = MLLDLoss(two_views=True, temperature=2.5, corrected=True, weight=0.7, warmup_epochs=2)
    options: dict[str, Any] = {"temperature": 2.5, "kd_weight": 1.0, "ce_weight": 0.0, "corrected": True}
    expected = mlld_loss(weak, strong, t_weak, t_strong, labels[:4], **options)
    torch.testing.assert_close(loss(student, teacher, labels), expected)
    assert (loss.views, loss.weight, loss.weight_at(0)) == (2, 0.7, 0.35)


def test_with_one_view_the_terms_of_the_strong_view_are_left_out() -> None:
    student, teacher = _outputs(8)
    value = MLLDLoss()(student, teacher, torch.full((8,), -1))
    terms = [
        loss(student.logits, None, teacher.logits, None, kd_weight=1.0)
        for loss in (mlld_instance_loss, mlld_class_loss, mlld_batch_loss)
    ]
    torch.testing.assert_close(value, torch.stack(terms).sum())
    assert MLLDLoss().views == 1


def test_defaults_match_the_released_code() -> None:
    loss = MLLDLoss()
    assert (loss.weight, loss.temperature, loss.corrected, loss.warmup_epochs) == (0.9, 4.0, False, 0)
    assert loss.gather
    assert loss.compares_logits


def test_a_temperature_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^temperature must be above 0, got 0\.0\.$"):
        MLLDLoss(temperature=0.0)
