from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_inputs import Array, random_labels
from scipy.special import log_softmax, softmax
from torch import Tensor, nn

from kd_lightning.features import Outputs
from kd_lightning.losses import USKDLoss, uskd_loss, uskd_mixed_labels_loss

WEIGHTS: dict[str, Any] = {"alpha": 0.7, "beta": 0.4, "mu": 0.2}


def random_case(rows: int, classes: int) -> tuple[Tensor, Tensor, nn.Linear]:
    return 2 * torch.randn(rows, classes).double(), torch.randn(rows, 3).double(), nn.Linear(3, classes).double()


def random_mixture(rows: int, classes: int) -> Tensor:
    """Return probabilities of two classes a row; the third row is unlabelled, the fourth of one class."""
    first, share = torch.randint(classes - 1, (rows,)), torch.rand(rows, 1).double() * 0.4 + 0.55
    mixed = share * F.one_hot(first, classes) + (1 - share) * F.one_hot(first + 1, classes)
    mixed[2:3] = -1.0
    mixed[3:4] = F.one_hot(first[3:4], classes).double()
    return mixed


def plain_uskd(
    student: Array, weak: Array, labels: list[dict[int, float]], weights: tuple[float, float, float], corrected: bool
) -> float:
    """Compute the loss row by row; labels give the mass of each label's class, and nothing where unlabelled."""
    rows = [(s, w, y) for s, w, y in zip(student, weak, labels, strict=True) if y]
    means = []
    for k in range(max(len(y) for _, _, y in rows)):
        means.append(np.mean([softmax(s)[list(y)[k]] ** 2 for s, _, y in rows if len(y) > k]))
    total = 0.0
    for s, w_logits, y in rows:
        log_p, w = log_softmax(s), softmax(w_logits)
        p = np.exp(log_p) if corrected else log_p
        classes = range(len(s))
        for (c, mass), mean in zip(y.items(), means, strict=False):
            total -= weights[0] * (np.exp(log_p[c]) ** 2 + mass - mean) * log_p[c] if mass else 0
        smooth = [0.9 * y.get(c, 0) + 0.1 / len(s) for c in classes]
        total -= weights[2] * float(np.dot(smooth, log_softmax(w_logits)))
        score = w / (1 - sum(w[c] for c in y) + 1e-6) + p / (1 - sum(p[c] for c in y) + 1e-6)
        places = {c: place for place, c in enumerate(sorted(classes, key=score.__getitem__, reverse=True), 1)}
        others = [c for c in classes if c not in y]
        zipf = np.array([1 / places[c] for c in others])
        total -= weights[1] * float(zipf / zipf.sum() @ log_softmax(s[others]))
    return total / len(rows)


@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (3, 3), (6, 5), (5, 40)])
@pytest.mark.parametrize("corrected", [False, True])
def test_matches_the_published_formula(rows: int, classes: int, corrected: bool) -> None:
    (student, feature, fc), labels = random_case(rows, classes), random_labels(rows, classes)
    value = uskd_loss(student, feature, labels, fc=fc, **WEIGHTS, corrected=corrected)
    weak = fc(feature).detach().numpy()
    masses = [{y: 1.0} if y >= 0 else {} for y in labels.tolist()]
    expected = plain_uskd(student.numpy(), weak, masses, (0.7, 0.4, 0.2), corrected)
    assert value.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("rows", "classes"), [(1, 3), (3, 3), (6, 5), (7, 40)])
@pytest.mark.parametrize("corrected", [False, True])
def test_two_mixed_labels_match_the_published_formula(rows: int, classes: int, corrected: bool) -> None:
    (student, feature, fc), labels = random_case(rows, classes), random_mixture(rows, classes)
    value = uskd_mixed_labels_loss(student, feature, labels, fc=fc, **WEIGHTS, corrected=corrected)
    weak = fc(feature).detach().numpy()
    masses = []
    for row in labels.numpy():
        two = np.argsort(-row, kind="stable")[:2]  # of one class the first of the others is the second
        masses.append({int(c): row[c] for c in two if row[c] > (0 if corrected else -1)})
    expected = plain_uskd(student.numpy(), weak, masses, (0.7, 0.4, 0.2), corrected)
    assert value.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("corrected", [False, True])
def test_a_row_of_one_class_among_mixed_ones_has_one_label_if_corrected(corrected: bool) -> None:
    (student, feature, fc), labels = random_case(5, 6), random_mixture(5, 6)
    student.requires_grad_()
    value = uskd_mixed_labels_loss(student, feature, labels, fc=fc, alpha=0.0, beta=1.0, mu=0.0, corrected=corrected)
    (gradient,) = torch.autograd.grad(value, student)
    assert (gradient == 0).sum(1).tolist() == [2, 2, 6, 1 if corrected else 2, 2]


def test_gradients_pass_gradcheck_where_targets_are_constant() -> None:
    """The targets have no gradient: with alpha 0 and a fixed order the loss is what its formula says."""
    (student, feature, fc), labels = random_case(3, 4), torch.tensor([0, 3, 1])

    def loss(student: Tensor, feature: Tensor) -> Tensor:
        return uskd_loss(student, feature, labels, fc=fc, alpha=0.0, beta=0.5, mu=0.5)

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(), feature.requires_grad_()))


def test_the_targets_have_no_gradient() -> None:
    (student, feature, fc), labels = random_case(3, 4), torch.tensor([0, 3, 1])
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(uskd_loss(student, feature, labels, fc=fc, alpha=1.0, beta=0.0, mu=0.0), student)
    p = student.detach().softmax(1)
    square = p.gather(1, labels[:, None]).square()
    expected = (square + 1 - square.mean()) * (p - F.one_hot(labels, 4)) / 3
    torch.testing.assert_close(gradient, expected)


def test_the_second_classifier_learns_from_its_own_cross_entropy_alone() -> None:
    (student, feature, fc), labels = random_case(4, 5), torch.tensor([0, 3, 1, -1])
    uskd_loss(student, feature, labels, fc=fc, **WEIGHTS).backward()
    assert fc.weight.grad is not None
    own = 0.2 * F.cross_entropy(fc(feature[:3]), labels[:3], label_smoothing=0.1)
    torch.testing.assert_close(fc.weight.grad, torch.autograd.grad(own, fc.weight)[0])


def test_no_labels_give_0() -> None:
    student, feature, fc = random_case(3, 4)
    assert uskd_loss(student, feature, torch.full((3,), -1), fc=fc) == 0
    assert uskd_mixed_labels_loss(student, feature, torch.full((3, 4), -1.0), fc=fc) == 0


def test_the_module_builds_its_classifier_and_passes_its_options() -> None:
    (student, feature, _), labels = random_case(6, 5), random_labels(6, 5)
    outputs = Outputs(student, {"middle": feature[:, :, None, None].expand(6, 3, 2, 2)})
    loss = USKDLoss(student_layers=["middle"], corrected=True, weight=0.7, warmup_epochs=2, **WEIGHTS)
    loss.build(outputs, outputs)
    loss.double()
    assert {name: tuple(value.shape) for name, value in loss.state_dict().items()} == {
        "fc.weight": (5, 3),
        "fc.bias": (5,),
    }
    assert loss.fc is not None
    expected = uskd_loss(student, feature, labels, fc=loss.fc, corrected=True, **WEIGHTS)
    torch.testing.assert_close(loss(outputs, None, labels), expected)
    assert (loss.weight, loss.weight_at(0)) == (0.7, 0.35)


def test_it_needs_no_teacher() -> None:
    loss = USKDLoss()
    assert not loss.needs_teacher
    assert not loss.compares_logits
    assert loss.teacher_layers == ()


def test_defaults_match_the_released_code() -> None:
    loss = USKDLoss()
    assert (loss.weight, loss.alpha, loss.beta, loss.mu, loss.corrected) == (1.0, 0.1, 0.1, 0.1, False)
    assert (loss.student_layers, loss.gather, loss.warmup_epochs) == (("layer2",), True, 0)


def test_what_does_not_fit_is_refused() -> None:
    outputs = Outputs(torch.zeros(2, 5), {"layer2": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"needs more than one number \(B,\) of layer 'layer2'; name another"):
        USKDLoss().check(outputs, outputs)
    with pytest.raises(RuntimeError, match="no second classifier yet"):
        USKDLoss()(Outputs(torch.zeros(2, 5), {"layer2": torch.zeros(2, 3)}), None, torch.zeros(2).long())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mu": -1.0}, r"^alpha, beta and mu must be >= 0, got 0\.1, 0\.1 and -1\.0\.$"),
        ({"student_layers": []}, r"reads one layer of the student, got \[\]; name one"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        USKDLoss(**options)
