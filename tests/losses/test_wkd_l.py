from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_inputs import Array, random_labels, random_logits
from scipy.special import log_softmax, softmax
from torch import Tensor, nn

from kd_lightning.features import Outputs
from kd_lightning.losses import WKDLogitLoss, wkd_cost_fc, wkd_l_all_classes_loss, wkd_l_loss
from kd_lightning.networks import EnsembleTeacher, ResNet

OPTIONS: dict[str, Any] = {"temperature": 1.5, "sinkhorn_lambda": 0.1, "sinkhorn_iter": 4}


def random_costs(classes: int) -> Tensor:
    """Return costs that are not symmetric, one of them below 0."""
    costs = torch.rand(classes, classes, dtype=torch.float64)
    costs[0, 1] = -0.1
    return costs


def plain_transport(student: Array, teacher: Array, costs: Array) -> float:
    """Return the cost of moving one row of logits onto the other."""
    costs = np.maximum(costs, 0) + 1e-8
    kernel = np.exp(-costs / 0.1)
    a, b = softmax(student / 1.5), softmax(teacher / 1.5)
    u = np.full(len(a), 1 / len(a))
    for _ in range(4):
        v = b / (kernel.T @ u + 1e-8)
        u = a / (kernel @ v + 1e-8)
    return float(np.sum(u[:, None] * kernel * v * costs))


def plain_wkd(student: Array, teacher: Array, labels: list[int], costs: Array, gamma: float) -> float:
    rows = []
    for s, t, y in zip(student, teacher, labels, strict=True):
        if y >= 0:
            others = [c for c in range(len(s)) if c != y]
            distance = plain_transport(s[others], t[others], costs[np.ix_(others, others)])
            rows.append(-softmax(t)[y] * log_softmax(s)[y] + gamma * distance)
    return float(np.mean(rows))


@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (2, 3), (5, 4), (6, 30)])
def test_matches_the_published_formula(rows: int, classes: int) -> None:
    (student, teacher), labels, costs = (
        random_logits(rows, classes),
        random_labels(rows, classes),
        random_costs(classes),
    )
    value = wkd_l_loss(student, teacher, labels, costs, gamma=7.0, **OPTIONS)
    expected = plain_wkd(student.numpy(), teacher.numpy(), labels.tolist(), costs.numpy(), 7.0)
    assert value.item() == pytest.approx(expected, rel=1e-10)
    every = wkd_l_all_classes_loss(student, teacher, costs, **OPTIONS)
    pairs = zip(student.numpy(), teacher.numpy(), strict=True)
    assert every.item() == pytest.approx(np.mean([plain_transport(s, t, costs.numpy()) for s, t in pairs]), rel=1e-10)


def test_gradients_pass_gradcheck() -> None:
    (student, teacher), labels, costs = random_logits(3, 4), random_labels(3, 4), random_costs(4)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: wkd_l_loss(s, teacher, labels, costs, **OPTIONS), student)
    assert torch.autograd.gradcheck(lambda s: wkd_l_all_classes_loss(s, teacher, costs, **OPTIONS), student)


def test_a_little_entropy_gives_the_exact_transport_of_a_line() -> None:
    """Of classes on a line the distance is the area between the cumulated probabilities."""
    student, teacher = random_logits(3, 5, spread=1.0)
    place = torch.linspace(0, 1, 5, dtype=torch.float64)
    costs = (place[:, None] - place).abs()
    value = wkd_l_all_classes_loss(student, teacher, costs, temperature=1.0, sinkhorn_lambda=0.03, sinkhorn_iter=3000)
    area = (student.softmax(1).cumsum(1) - teacher.softmax(1).cumsum(1)).abs()[:, :-1].sum(1) / 4
    assert value.item() == pytest.approx(area.mean().item(), rel=0.05)


def test_confusing_similar_classes_costs_less() -> None:
    costs = torch.tensor([[0.0, 0.1, 0.9], [0.1, 0.0, 0.9], [0.9, 0.9, 0.0]])
    teacher, near, far = 8 * F.one_hot(torch.tensor([[0], [1], [2]]), 3).float()
    assert wkd_l_all_classes_loss(near, teacher, costs) < 0.5 * wkd_l_all_classes_loss(far, teacher, costs)


def test_unlabelled_rows_are_left_out_and_of_probabilities_the_largest_counts() -> None:
    (student, teacher), costs = random_logits(4, 5), random_costs(5)
    labels = torch.tensor([2, -1, 0, -1])
    value = wkd_l_loss(student, teacher, labels, costs)
    torch.testing.assert_close(value, wkd_l_loss(student[::2], teacher[::2], labels[::2], costs))
    mixed = 0.7 * F.one_hot(labels.clamp(min=0), 5) + 0.3 * F.one_hot(torch.tensor([1, 1, 4, 4]), 5)
    mixed[labels < 0] = -1.0
    torch.testing.assert_close(wkd_l_loss(student, teacher, mixed, costs), value)
    assert wkd_l_loss(student, teacher, torch.full((4,), -1), costs) == 0


def _outputs(classes: int = 5) -> tuple[Outputs, Outputs, Tensor]:
    student, teacher = random_logits(6, classes)
    return Outputs(student), Outputs(teacher), random_labels(6, classes)


def _network(classes: int = 5) -> ResNet:
    return ResNet([1], [4], classes, in_channels=1)


def test_the_module_takes_the_costs_of_the_teachers_classifier() -> None:
    student, teacher, labels = _outputs()
    network = _network()
    loss = WKDLogitLoss(gamma=7.0, sharpen=2.0, weight=0.7, warmup_epochs=2, **OPTIONS)
    loss.build(student, teacher, teacher_network=network)
    costs = wkd_cost_fc(network.fc.weight.detach(), sharpen=2.0)
    expected = wkd_l_loss(student.logits, teacher.logits, labels, costs, gamma=7.0, **OPTIONS)
    torch.testing.assert_close(loss(student, teacher, labels), expected)
    assert (loss.weight, loss.weight_at(0)) == (0.7, 0.35)
    assert loss.state_dict() == {}, "costs are not in checkpoints"
    assert loss.to(torch.bfloat16).costs.dtype == torch.float32


def test_the_module_reads_costs_from_a_file(tmp_path: Path) -> None:
    student, teacher, labels = _outputs()
    costs = random_costs(5)
    torch.save({"cost_matrix": costs}, tmp_path / "costs.pt")
    loss = WKDLogitLoss(cost_matrix=str(tmp_path / "costs.pt"))
    loss.build(student, teacher, teacher_network=_network())
    expected = wkd_l_loss(student.logits, teacher.logits, labels, costs, temperature=8.0, gamma=600.0)
    torch.testing.assert_close(loss(student, teacher, labels), expected)


def test_a_student_is_rebuilt_without_teacher_and_file() -> None:
    student, teacher, labels = _outputs()
    loss = WKDLogitLoss(cost_matrix="not/there.pt")
    loss.build(student, teacher)
    with pytest.raises(RuntimeError, match="has no costs yet; call build with the teacher's network"):
        loss(student, teacher, labels)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no checkpoint"),
        (
            {"costs": torch.zeros(5, 5)},
            r"a tensor \(5, 5\), got NoneType from .*costs.pt; compute it for these classes",
        ),
        ({"cost_matrix": torch.zeros(4, 4)}, r"each pair of the 5 classes, a tensor \(5, 5\), got \(4, 4\) from"),
    ],
)
def test_costs_that_do_not_fit_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    if content is not None:
        torch.save(content, tmp_path / "costs.pt")
    student, teacher, _ = _outputs()
    loss = WKDLogitLoss(cost_matrix=str(tmp_path / "costs.pt"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        loss.build(student, teacher, teacher_network=_network())


def test_a_teacher_without_one_linear_classifier_is_refused() -> None:
    student, teacher, _ = _outputs()
    for network in (EnsembleTeacher([_network(), _network()]), nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten())):
        with pytest.raises(
            ValueError, match=r"reads the teacher's classifier, one linear layer that computes the logit"
        ):
            WKDLogitLoss().build(student, teacher, teacher_network=network)


def test_defaults_match_the_released_code() -> None:
    loss = WKDLogitLoss()
    assert (loss.weight, loss.temperature, loss.gamma, loss.warmup_epochs) == (1.0, 8.0, 600.0, 0)
    assert (loss.sinkhorn_lambda, loss.sinkhorn_iter, loss.sharpen, loss.cost_matrix) == (0.05, 10, 1.0, None)
    assert loss.compares_logits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"^temperature and sinkhorn_lambda must be above 0, got 0\.0 and 0\.05\.$"),
        ({"sinkhorn_lambda": -1.0}, "must be above 0, got 8.0 and -1.0"),
        ({"gamma": -1.0}, r"^gamma and sharpen must be >= 0, got -1\.0 and 1\.0\.$"),
        ({"sharpen": -1.0}, "got 600.0 and -1.0"),
        ({"sinkhorn_iter": 0}, r"^sinkhorn_iter must be >= 1, got 0\.$"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WKDLogitLoss(**options)
