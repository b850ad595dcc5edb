"""VkD: the formula written out, its orthogonal projections against PyTorch's, and their start."""

from typing import Any

import pytest
import torch
from random_inputs import random_outputs, random_rotation
from restated import assert_equal_with_gradients
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from kd_lightning.features import Grid, tokens_to_maps
from kd_lightning.losses import VkDLoss, vkd_loss, vkd_orthogonal_loss, vkd_orthogonal_square_loss
from kd_lightning.losses.vkd import orthogonal_weight

LABELS = torch.tensor([3, -1])


def restated(tokens: Tensor, fmap: Tensor, weight: Tensor, alpha: float) -> Tensor:
    terms = []
    for sample in range(len(tokens)):
        student = weight @ (sum(tokens[sample]) / len(tokens[sample]))
        teacher = torch.stack([channel.sum() / channel.numel() for channel in fmap[sample]])
        centred = teacher - teacher.mean()
        normalised = centred / ((centred**2).mean() + 1e-5) ** 0.5
        for s, t in zip(student, normalised, strict=True):
            distance = (s - t).abs()
            terms.append(distance**2 / 2 if distance < 1 else distance - 0.5)
    return alpha * torch.stack(terms).mean()


def reflected(original: Tensor, base: Tensor) -> Tensor:
    rows, columns = original.shape
    product = torch.eye(rows, dtype=torch.float64)
    for k in range(columns):
        below = [original[i, k] for i in range(k + 1, rows)]
        a = torch.stack([torch.zeros((), dtype=torch.float64)] * k + [torch.ones((), dtype=torch.float64)] + below)
        product = product @ (torch.eye(rows, dtype=torch.float64) - 2 * torch.outer(a, a) / (a @ a))
    return base @ product[:, :columns] * original.diagonal().sign()


def exponential(original: Tensor, base: Tensor) -> Tensor:
    skew = original.tril(-1) - original.tril(-1).T
    total = term = torch.eye(len(skew), dtype=torch.float64)
    for k in range(1, 60):
        term = term @ skew / k
        total = total + term
    return base @ total


def inputs(width: int, teacher_width: int) -> tuple[Tensor, Tensor]:
    student = torch.randn(3, 5, width, dtype=torch.float64)
    return 2 * student, torch.randn(3, teacher_width, 4, 2, dtype=torch.float64) + 1


@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_equals_the_formula(alpha: float) -> None:
    weight = torch.randn(6, 3, dtype=torch.float64)
    assert_equal_with_gradients(
        lambda s, t, w: vkd_loss(s, t, w, alpha=alpha),
        lambda s, t, w: restated(s, t, w, alpha),
        [*inputs(3, 6), weight],
    )


@pytest.mark.parametrize(("width", "teacher_width"), [(3, 6), (4, 5), (1, 7), (5, 5)])
def test_reflections_equal_the_formula(width: int, teacher_width: int) -> None:
    base, original = random_rotation(teacher_width), torch.randn(teacher_width, width, dtype=torch.float64)
    assert_equal_with_gradients(
        lambda s, t, a: vkd_orthogonal_loss(s, t, base, original=a, alpha=0.7),
        lambda s, t, a: restated(s, t, reflected(a, base), 0.7),
        [*inputs(width, teacher_width), original],
    )


def test_the_exponential_of_a_square_weight_equals_the_formula() -> None:
    base, original = random_rotation(4), torch.randn(4, 4, dtype=torch.float64)
    assert_equal_with_gradients(
        lambda s, t, a: vkd_orthogonal_square_loss(s, t, base, original=a, alpha=1.2),
        lambda s, t, a: restated(s, t, exponential(a, base), 1.2),
        [*inputs(4, 4), original],
    )


@pytest.mark.parametrize(("out", "width"), [(7, 4), (4, 7)])
def test_the_weight_is_that_of_pytorchs_parametrization(out: int, width: int) -> None:
    linear: Any = parametrizations.orthogonal(nn.Linear(width, out, bias=False).double())
    parametrization = linear.parametrizations.weight
    with torch.no_grad():
        below = parametrization.original if out >= width else parametrization.original.T
        below += torch.randn_like(below).tril(-1)
    weight = orthogonal_weight(parametrization.original, parametrization[0].base)
    torch.testing.assert_close(weight, linear.weight, rtol=1e-10, atol=1e-12)
    gram = weight.T @ weight if out >= width else weight @ weight.T
    torch.testing.assert_close(gram, torch.eye(min(out, width), dtype=torch.float64))


def test_weight_decay_on_the_diagonal_changes_nothing() -> None:
    """PyTorch's parametrization truncates 0.999 to 0 there."""
    original = torch.randn(5, 3, dtype=torch.float64)
    decayed = original.clone()
    decayed.diagonal().mul_(0.999)
    torch.testing.assert_close(orthogonal_weight(decayed, torch.eye(5)), orthogonal_weight(original, torch.eye(5)))


def test_a_rotation_of_the_student_is_undone_by_the_projection() -> None:
    rotation, weight = random_rotation(3), torch.randn(6, 3, dtype=torch.float64)
    tokens, fmap = inputs(3, 6)
    torch.testing.assert_close(vkd_loss(tokens @ rotation.T, fmap, weight @ rotation.T), vkd_loss(tokens, fmap, weight))
    torch.testing.assert_close(
        vkd_loss(tokens, 3 * fmap + 2, weight), vkd_loss(tokens, fmap, weight), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize(("width", "teacher_width"), [(3, 6), (6, 3), (4, 4)])
def test_the_class_starts_and_stays_orthogonal_and_is_saved_and_rebuilt(width: int, teacher_width: int) -> None:
    def loss() -> VkDLoss:
        made = VkDLoss(student_layers=["a"])
        made.build(student, teacher)
        return made

    student, teacher = random_outputs(2, a=(width, 2, 2)), random_outputs(2, a=(teacher_width, 4, 4))
    first, second = loss(), loss()
    for name, value in first.state_dict().items():  # the start draws nothing from the generator of all
        assert value.equal(second.state_dict()[name])
    optimizer = torch.optim.AdamW(first.parameters(), lr=0.1, weight_decay=0.1)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        value = first(student, teacher, LABELS)
        value.backward()
        optimizer.step()
        values.append(value.item())
        weight = first.projections[0]()
        gram = weight.T @ weight if teacher_width >= width else weight @ weight.T
        torch.testing.assert_close(gram, torch.eye(min(width, teacher_width)), atol=1e-5, rtol=0)
    assert values[-1] < values[0]
    second.load_state_dict(first.state_dict())
    assert second(student, teacher, LABELS) == first(student, teacher, LABELS)


def test_tokens_without_a_place_are_left_out() -> None:
    loss = VkDLoss(student_layers=["a"], teacher_layers=["b"])
    student, teacher = random_outputs(2, a=(18, 3)), random_outputs(2, b=(7, 4, 4))
    loss.build(student, teacher)
    weight = loss.projections[0]()
    expected = vkd_loss(student.features["a"][:, 2:], teacher.features["b"], weight)
    torch.testing.assert_close(loss(student, teacher, LABELS), expected)
    maps = random_outputs(2, a=(3, 4, 4))
    maps.features["a"] = tokens_to_maps(student.features["a"], Grid(2, 4, 4))
    torch.testing.assert_close(loss(maps, teacher, LABELS), expected)


def test_a_teacher_of_one_channel_is_refused() -> None:
    loss = VkDLoss(student_layers=["a"])
    with pytest.raises(ValueError, match=r"^VkDLoss normalises the teacher's layer 'a', which has 1 channel; name"):
        loss.build(random_outputs(2, a=(3,)), random_outputs(2, a=(1, 2, 2)))


def test_defaults_are_the_published_ones() -> None:
    assert (VkDLoss().weight, VkDLoss().warmup_epochs) == (1.0, 0)
