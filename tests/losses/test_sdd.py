import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_inputs import Array, random_labels
from torch import Tensor, nn

from kd_lightning.features import FeatureTap, Outputs
from kd_lightning.losses import (
    SDDDKDLoss,
    SDDKDLoss,
    decoupled_loss,
    nkd_loss,
    sdd_dkd_loss,
    sdd_kd_loss,
    sdd_nkd_loss,
    sdd_pool,
    soft_target_loss,
)
from kd_lightning.networks import ResNet

OneRow = Callable[[Tensor, Tensor, Tensor], Tensor]


def random_regions(rows: int, classes: int, regions: int) -> tuple[Tensor, Tensor]:
    student, teacher = 2 * torch.randn(2, rows, classes, regions, dtype=torch.float64)
    return student, teacher


def plain_sdd(student: Tensor, teacher: Tensor, labels: Tensor, one_row: OneRow, *, label_free: bool = False) -> float:
    """Sum a loss over every region of every image, one by one."""
    total, images = 0.0, 0
    for image, label in enumerate(labels.tolist()):
        if label < 0 and not label_free:
            continue
        images += 1
        whole_is_right = int(teacher[image, :, 0].argmax()) == label
        for region in range(teacher.shape[2]):
            is_right = int(teacher[image, :, region].argmax()) == label
            weight = 2 if is_right != whole_is_right and label >= 0 else 1
            one = slice(image, image + 1)
            total += weight * one_row(student[one, :, region], teacher[one, :, region], labels[one]).item()
    return total / images / teacher.shape[2]


SHAPES = [(1, 2, 1), (3, 3, 5), (8, 4, 21)]


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_published_formula(shape: tuple[int, int, int]) -> None:
    (student, teacher), labels = random_regions(*shape), random_labels(*shape[:2])
    value = sdd_kd_loss(student, teacher, labels, temperature=3.0)
    expected = plain_sdd(
        student, teacher, labels, lambda s, t, y: soft_target_loss(s, t, temperature=3.0), label_free=True
    )
    assert value.item() == pytest.approx(expected, rel=1e-10)
    options: dict[str, Any] = {"alpha": 0.5, "beta": 3.0, "temperature": 2.0}
    value = sdd_dkd_loss(student, teacher, labels, **options)
    expected = plain_sdd(student, teacher, labels, lambda s, t, y: decoupled_loss(s, t, y, **options))
    assert value.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_nkd_keeps_the_label_in_its_second_term_unless_corrected(shape: tuple[int, int, int]) -> None:
    (student, teacher), labels = random_regions(*shape), random_labels(*shape[:2])

    def as_released(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        first = nkd_loss(s, t, y, gamma=0.0)
        return first - 0.7 * 4 * ((t / 2).softmax(1) * (s / 2).log_softmax(1)).sum()

    options: dict[str, Any] = {"temperature": 2.0, "gamma": 0.7}
    value = sdd_nkd_loss(student, teacher, labels, **options)
    assert value.item() == pytest.approx(plain_sdd(student, teacher, labels, as_released), rel=1e-10)
    value = sdd_nkd_loss(student, teacher, labels, corrected=True, **options)
    expected = plain_sdd(student, teacher, labels, lambda s, t, y: nkd_loss(s, t, y, **options))
    assert value.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("loss", [sdd_kd_loss, sdd_dkd_loss, sdd_nkd_loss])
def test_gradients_pass_gradcheck(loss: Callable[..., Tensor]) -> None:
    (student, teacher), labels = random_regions(3, 4, 5), random_labels(3, 4)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, labels), student.requires_grad_())


def test_a_region_that_contradicts_the_whole_image_weighs_double() -> None:
    """The label is class 0: the whole is right, the first region too, the second one wrong."""
    teacher = torch.tensor([[[3.0, 2.0, -2.0], [0.0, 0.0, 0.0]]]).double()
    student = torch.zeros_like(teacher)
    parts = [soft_target_loss(student[..., n], teacher[..., n], temperature=1.0) for n in range(3)]
    value = sdd_kd_loss(student, teacher, torch.tensor([0]), temperature=1.0)
    torch.testing.assert_close(value, (parts[0] + parts[1] + 2 * parts[2]) / 3)
    value = sdd_kd_loss(student, teacher, torch.tensor([1]), temperature=1.0)  # the second region alone is right
    torch.testing.assert_close(value, (parts[0] + parts[1] + 2 * parts[2]) / 3)
    value = sdd_kd_loss(student, teacher, torch.tensor([-1]), temperature=1.0)
    torch.testing.assert_close(value, sum(parts) / 3)


def test_probabilities_count_as_their_most_probable_class() -> None:
    (student, teacher), labels = random_regions(4, 5, 5), torch.tensor([2, -1, 0, 4])
    mixed = 0.7 * F.one_hot(labels.clamp(min=0), 5) + 0.3 * F.one_hot(torch.tensor([1, 1, 4, 3]), 5)
    mixed[labels < 0] = -1.0
    for loss in (sdd_kd_loss, sdd_dkd_loss, sdd_nkd_loss):
        torch.testing.assert_close(loss(student, teacher, mixed), loss(student, teacher, labels))


@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 8), (7, 5), (1, 1), (2, 6)])
def test_regions_are_means_of_a_grid_of_four_by_four(height: int, width: int) -> None:
    fmap = torch.randn(2, 3, height, width, dtype=torch.float64)

    def mean(values: Array, i: int, j: int, side: int) -> Array:
        rows = slice(i * values.shape[2] // side, -(-(i + 1) * values.shape[2] // side))
        columns = slice(j * values.shape[3] // side, -(-(j + 1) * values.shape[3] // side))
        return values[:, :, rows, columns].mean((2, 3))

    places = list(product(range(4), repeat=2))
    finest = np.stack([mean(fmap.numpy(), i, j, 4) for i, j in places], 2).reshape(2, 3, 4, 4)
    for pools in ((1, 2), (1, 2, 4)):
        expected = [mean(finest, i, j, side) for side in pools for i, j in product(range(side), repeat=2)]
        found = sdd_pool(fmap, pools=pools)
        torch.testing.assert_close(found, torch.from_numpy(np.stack(expected, 2)))


def _networks() -> tuple[ResNet, ResNet]:
    return ResNet([1, 1], [4, 8], 5, in_channels=1), ResNet([1, 1], [6, 12], 5, in_channels=1).eval()


def _run(student: nn.Module, teacher: nn.Module, images: Tensor) -> tuple[Outputs, Outputs]:
    return FeatureTap(student, ["layer2"])(images), FeatureTap(teacher, ["layer2"])(images)


def _built(kind: Any, student: nn.Module, teacher: nn.Module, outputs: tuple[Outputs, Outputs], **options: Any) -> Any:
    loss = kind(student_layers=["layer2"], **options)
    loss.build(*outputs, student_network=student, teacher_network=teacher)
    return loss


def test_the_classifiers_of_both_networks_give_the_logits_of_the_regions() -> None:
    (student, teacher), images = _networks(), torch.randn(6, 1, 16, 16)
    outputs, labels = _run(student, teacher, images), torch.tensor([0, 1, 2, 3, -1, 4])
    of_student, of_teacher = (
        network.fc(sdd_pool(o.features["layer2"]).transpose(1, 2)).transpose(1, 2).detach()
        for network, o in zip((student, teacher), outputs, strict=True)
    )
    for of_network, o in zip((of_student, of_teacher), outputs, strict=True):  # the whole image's are the network's own
        torch.testing.assert_close(of_network[..., 0], o.logits.detach())
    value = _built(SDDKDLoss, student, teacher, outputs, temperature=2.0)(*outputs, labels)
    torch.testing.assert_close(value, sdd_kd_loss(of_student, of_teacher, labels, temperature=2.0))
    options: dict[str, Any] = {"alpha": 0.5, "beta": 2.0, "temperature": 2.0}
    value = _built(SDDDKDLoss, student, teacher, outputs, **options)(*outputs, labels)
    torch.testing.assert_close(value, sdd_dkd_loss(of_student, of_teacher, labels, **options))
    pooled = _built(SDDKDLoss, student, teacher, outputs, pools=[1])(*outputs, labels)
    torch.testing.assert_close(pooled, soft_target_loss(*(o.logits for o in outputs), temperature=4.0))


def test_the_students_classifier_gets_a_gradient_and_belongs_to_the_student_alone() -> None:
    (student, teacher), images = _networks(), torch.randn(4, 1, 16, 16)
    outputs = _run(student, teacher, images)
    loss = _built(SDDKDLoss, student, teacher, outputs)
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == []
    teacher.zero_grad()
    teacher.requires_grad_(False)
    loss(*outputs, torch.arange(4)).backward()
    assert student.fc.weight.grad is not None
    assert student.fc.weight.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in teacher.parameters())


def test_a_replaced_classifier_and_that_of_a_copy_are_found() -> None:
    (student, teacher), images = _networks(), torch.randn(4, 1, 16, 16)
    outputs = _run(student, teacher, images)
    both = nn.ModuleDict({"network": student, "loss": _built(SDDKDLoss, student, teacher, outputs)})
    copied = copy.deepcopy(both)
    before = both["loss"](*outputs, torch.arange(4))
    student.fc = nn.Linear(8, 5)
    assert both["loss"](*outputs, torch.arange(4)) != before
    assert copied["loss"](*outputs, torch.arange(4)) == before
    with torch.no_grad():
        copied.get_parameter("network.fc.weight").zero_()
    assert copied["loss"](*outputs, torch.arange(4)) != before


def test_what_does_not_fit_is_refused() -> None:
    student, teacher = _networks()
    outputs = [FeatureTap(network, ["layer1", "layer2"])(torch.randn(2, 1, 16, 16)) for network in (student, teacher)]
    with pytest.raises(
        ValueError, match="takes 8 values and layer 'layer1' has 4 channels; name the layer whose pooled"
    ):
        SDDKDLoss(student_layers=["layer1"]).build(*outputs, student_network=student, teacher_network=teacher)
    headless = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten(2))
    with pytest.raises(ValueError, match="reads the student's classifier, one linear layer"):
        SDDKDLoss(student_layers=["layer2"]).build(*outputs, student_network=headless, teacher_network=teacher)
    unbuilt = SDDKDLoss(student_layers=["layer2"])
    unbuilt.build(*outputs)  # of a checkpoint without a teacher
    with pytest.raises(RuntimeError, match="SDDKDLoss has no classifiers yet"):
        unbuilt(*outputs, torch.arange(2))


def test_defaults_match_the_released_code() -> None:
    loss, decoupled = SDDKDLoss(), SDDDKDLoss()
    assert (loss.weight, loss.temperature, loss.pools, loss.warmup_epochs) == (0.9, 4.0, (1, 2, 4), 0)
    assert (decoupled.weight, decoupled.alpha, decoupled.beta) == (1.0, 1.0, 8.0)
    assert (decoupled.temperature, decoupled.pools, decoupled.warmup_epochs) == (4.0, (1, 2, 4), 20)
    assert loss.compares_logits


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SDDKDLoss, {"temperature": 0.0}, r"^temperature must be above 0, got 0\.0\.$"),
        (SDDDKDLoss, {"temperature": 0.0}, r"^temperature must be above 0, got 0\.0\.$"),
        (SDDDKDLoss, {"alpha": -1.0}, r"^alpha and beta must be >= 0, got -1\.0 and 8\.0\.$"),
        (SDDKDLoss, {"student_layers": ["a", "b"]}, r"reads one layer, .*, got \['a', 'b'\]; name one"),
        (SDDKDLoss, {"pools": [2, 4]}, r"pools must start with 1, the whole image, and be at most 4, got \[2, 4\]"),
        (SDDKDLoss, {"pools": [1, 8]}, r"and be at most 4, got \[1, 8\]"),
        (SDDKDLoss, {"pools": []}, r"got \[\]"),
    ],
)
def test_invalid_arguments_are_refused(kind: type[SDDKDLoss], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)
