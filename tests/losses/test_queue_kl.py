from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_inputs import Array, random_outputs
from scipy.special import rel_entr, softmax
from torch import Tensor, nn

from kd_lightning.features import Outputs
from kd_lightning.losses import (
    QueueKLLoss,
    push_to_queue,
    queue_kl_loss,
    queue_kl_step_loss,
    queue_kl_v3_local_loss,
    queue_kl_v3_loss,
)

_UNLABELLED = torch.full((3,), -1)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def plain_queue_kl(student: Array, teacher: Array, queue: Array, temperature: float) -> float:
    rows = []
    for s, t in zip(student, teacher, strict=True):
        p, q = (softmax([z @ row / temperature for row in queue]) for z in (t, s))
        rows.append(rel_entr(p, q).sum())
    return float(np.mean(rows))


def plain_local(student: Array, teacher: Array, temperature: float) -> float:
    rows = []
    for image, other in zip(student, teacher, strict=True):
        for s, t in zip(image, other, strict=True):
            p, q = (softmax([z @ row / temperature for row in all_]) for z, all_ in ((t, other), (s, image)))
            rows.append(rel_entr(p, q).sum())
    return float(np.mean(rows))


@pytest.mark.parametrize(("rows", "length", "width"), [(1, 1, 2), (3, 7, 4), (8, 3, 5)])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_matches_the_published_formula(rows: int, length: int, width: int, temperature: float) -> None:
    student, teacher, queue = unit(rows, width), unit(rows, width), unit(length, width)
    queue[-1] = 0  # not filled yet
    value = queue_kl_loss(student, teacher, queue, temperature=temperature)
    expected = plain_queue_kl(student.numpy(), teacher.numpy(), queue.numpy(), temperature)
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    local_student, local_teacher = unit(rows, 5, 3), unit(rows, 5, 4)
    local = queue_kl_v3_local_loss(local_student, local_teacher, temperature_local=temperature)
    of_tokens = plain_local(local_student.numpy(), local_teacher.numpy(), temperature)
    assert local.item() == pytest.approx(of_tokens, rel=1e-9)
    both = queue_kl_v3_loss(
        student,
        teacher,
        local_student,
        local_teacher,
        queue,
        temperature_global=temperature,
        temperature_local=temperature,
        local_weight=0.3,
    )
    assert both.item() == pytest.approx(expected + 0.3 * of_tokens, rel=1e-9)


def test_gradients_pass_gradcheck() -> None:
    student, teacher, queue, tokens, others = unit(3, 4), unit(3, 4), unit(5, 4), unit(2, 3, 4), unit(2, 3, 4)
    assert torch.autograd.gradcheck(
        lambda s: queue_kl_loss(s, teacher, queue, temperature=0.5), student.requires_grad_()
    )
    assert torch.autograd.gradcheck(
        lambda s: queue_kl_v3_local_loss(s, others, temperature_local=0.5), tokens.requires_grad_()
    )


@pytest.mark.parametrize("length", [1, 4, 5, 6, 20])
def test_a_step_puts_the_batch_at_the_front_of_the_queue_before_it_compares(length: int) -> None:
    head, features, others, queue = (
        nn.Linear(3, 4).double(),
        torch.randn(5, 3).double(),
        torch.randn(5, 4).double(),
        unit(length, 4),
    )
    teacher = F.normalize(others)
    after = torch.cat([teacher, queue])[:length]
    torch.testing.assert_close(push_to_queue(queue, teacher), after)
    value = queue_kl_step_loss(features, others, queue, head=head, temperature=0.2)
    expected = plain_queue_kl(F.normalize(head(features)).detach().numpy(), teacher.numpy(), after.numpy(), 0.2)
    assert value.item() == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_is_zero_at_equality_and_invariant_to_a_common_rotation_and_to_the_queues_order() -> None:
    student, teacher, queue = unit(4, 3), unit(4, 3), unit(6, 3)
    assert queue_kl_loss(teacher, teacher, queue).item() == pytest.approx(0, abs=1e-12)
    value = queue_kl_loss(student, teacher, queue)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    torch.testing.assert_close(queue_kl_loss(student @ turn, teacher @ turn, queue @ turn), value)
    torch.testing.assert_close(queue_kl_loss(student, teacher, queue.flip(0)), value)


def _built(queue_size: int = 8, **options: Any) -> QueueKLLoss:
    loss = QueueKLLoss(student_layers=["embed"], queue_size=queue_size, **options)
    loss.build(random_outputs(3, embed=(4, 2, 2)), random_outputs(3, embed=(6,)))
    return loss


def _batch(rows: int = 3) -> tuple[Outputs, Outputs]:
    return random_outputs(rows, embed=(4, 2, 2)), random_outputs(rows, embed=(6,))


@pytest.mark.parametrize("queue_size", [1, 3, 7, 100])
def test_the_module_keeps_the_queue_over_steps(queue_size: int) -> None:
    loss, queue = _built(queue_size, temperature=0.3), torch.zeros(queue_size, 6)
    for rows in (3, 2, 5, 1):
        student, teacher = _batch(rows)
        embedding, target = student.features["embed"].mean((2, 3)), teacher.features["embed"]
        expected = queue_kl_step_loss(embedding, target, queue, head=loss.heads[0], temperature=0.3)
        torch.testing.assert_close(loss(student, teacher, _UNLABELLED), expected)
        queue = push_to_queue(queue, F.normalize(target))
        torch.testing.assert_close(loss.queue, queue)


def test_only_training_fills_the_queue() -> None:
    loss = _built().eval()
    loss(*_batch(), _UNLABELLED)
    torch.testing.assert_close(loss.queue, torch.zeros(8, 6))


def test_the_queue_is_saved_and_restored() -> None:
    loss, copied = _built(), _built()
    for _ in range(2):
        loss(*_batch(), _UNLABELLED)
    state = loss.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes == {"queue": (8, 6), "heads.0.weight": (6, 4), "heads.0.bias": (6,)}
    copied.load_state_dict(state)
    batch = _batch()
    assert loss(*batch, _UNLABELLED) == copied(*batch, _UNLABELLED)
    torch.testing.assert_close(loss.queue, copied.queue, rtol=0, atol=0)


def test_backward_works_after_the_batch_has_entered_the_queue() -> None:
    loss = _built()
    for _ in range(2):
        student, teacher = _batch()
        student.features["embed"].requires_grad_()
        loss(student, teacher, _UNLABELLED).backward()
        assert student.features["embed"].grad is not None
        assert student.features["embed"].grad.abs().sum() > 0


def test_a_second_layer_adds_the_local_term_on_the_teachers_grid() -> None:
    student, teacher = random_outputs(3, embed=(4,), last=(5, 2, 2)), random_outputs(3, embed=(6,), last=(7, 3, 4))
    loss = QueueKLLoss(student_layers=["embed", "last"], queue_size=8, temperature_local=0.2, local_weight=0.4)
    loss.build(student, teacher)
    embedded, target = loss.heads[0](student.features["embed"]), teacher.features["embed"]
    whole = queue_kl_step_loss(student.features["embed"], target, torch.zeros(8, 6), head=loss.heads[0])
    assert embedded.shape == target.shape
    weight, bias = loss.get_parameter("heads.1.weight"), loss.get_parameter("heads.1.bias")
    mapped = torch.einsum("bchw,dc->bdhw", student.features["last"], weight) + bias[:, None, None]
    resized = F.interpolate(mapped, size=(3, 4), mode="bilinear")
    tokens = [F.normalize(z.flatten(2).transpose(1, 2), dim=2) for z in (resized, teacher.features["last"])]
    local = queue_kl_v3_local_loss(tokens[0], tokens[1], temperature_local=0.2)
    torch.testing.assert_close(loss(student, teacher, _UNLABELLED), whole + 0.4 * local)


def test_other_classes_are_no_hindrance() -> None:
    student, teacher = _batch()
    loss = _built()
    assert not loss.compares_logits
    assert loss(student, Outputs(torch.zeros(3, 1000), teacher.features), _UNLABELLED).isfinite()


def test_defaults_match_the_released_code() -> None:
    loss = QueueKLLoss()
    assert (loss.weight, loss.temperature, loss.queue_size, loss.warmup_epochs) == (1.0, 0.07, 8192, 0)
    assert (loss.temperature_local, loss.local_weight, loss.gather) == (0.07, 1.0, True)
    assert loss.student_layers == ("avgpool",)
    with pytest.raises(RuntimeError, match="QueueKLLoss has no queue yet"):
        loss(*_batch(), _UNLABELLED)
    assert _built(10).get_parameter("heads.0.weight").std() < 0.04


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"^temperature and temperature_local must be above 0, got 0\.0 and 0\.07\.$"),
        ({"temperature_local": -1.0}, "got 0.07 and -1.0"),
        ({"queue_size": 0}, r"^queue_size must be >= 1, got 0\.$"),
        ({"local_weight": -1.0}, r"^local_weight must be >= 0, got -1\.0\.$"),
        ({"student_layers": ["a", "b", "c"]}, r"one or two layers, got \['a', 'b', 'c'\]"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QueueKLLoss(**options)
