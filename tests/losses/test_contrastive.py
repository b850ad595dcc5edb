import math
from collections import deque
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_inputs import random_rotation
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses import ContrastiveLoss, contrastive_loss

Batch = tuple[Outputs, Outputs, Tensor]


def random_batch(labels: list[int] | Tensor) -> Batch:
    rows = len(labels)
    student = Outputs(torch.randn(rows, 4), {"a": torch.randn(rows, 3, 2, 2), "b": torch.randn(rows, 5)})
    teacher = Outputs(torch.randn(rows, 4), {"a": torch.randn(rows, 6), "b": torch.randn(rows, 2)})
    return student, teacher, torch.as_tensor(labels)


def build_loss(queue_size: int = 6, layers: str = "ab", **options: Any) -> ContrastiveLoss:
    loss = ContrastiveLoss(student_layers=list(layers), dimensions=4, temperature=0.5, queue_size=queue_size, **options)
    loss.build(*random_batch([0, 1])[:2])
    return loss


def test_values_by_hand() -> None:
    anchors = torch.eye(2)
    shown = torch.zeros(2, 3, dtype=torch.bool)
    same = contrastive_loss(anchors, anchors, torch.full((3, 2), 0.5), shown, temperature=0.5)
    assert same.item() == pytest.approx(math.log((math.e**2 + 3 * math.e) / math.e**2))
    opposite = contrastive_loss(anchors[:1], -anchors[:1], anchors[:1], shown[:1, :1], temperature=1.0)
    assert opposite.item() == pytest.approx(2 + math.log(1 + math.exp(-2)))
    counted = contrastive_loss(
        anchors, anchors, torch.full((3, 2), 0.5), shown, temperature=0.5, effective_negatives=30
    )
    assert counted.item() == pytest.approx(math.log((math.e**2 + 30 * math.e) / math.e**2))
    assert contrastive_loss(anchors, -anchors, anchors, ~shown[:, :2], effective_negatives=9) == 0
    assert contrastive_loss(anchors, -anchors, anchors, ~shown[:, :2]) == 0
    assert contrastive_loss(anchors, -anchors, anchors[:0], shown[:, :0]) == 0


def test_invariant_to_the_order_of_negatives_and_a_common_rotation() -> None:
    anchors, positives, negatives = (F.normalize(torch.randn(n, 3).double()) for n in (4, 4, 7))
    excluded = torch.rand(4, 7) < 0.3
    loss = contrastive_loss(anchors, positives, negatives, excluded)
    order, q = torch.randperm(7), random_rotation(3)
    torch.testing.assert_close(contrastive_loss(anchors, positives, negatives[order], excluded[:, order]), loss)
    torch.testing.assert_close(contrastive_loss(anchors @ q, positives @ q, negatives @ q, excluded), loss)
    excluded[0] = True  # so that the first anchor has no negatives
    kept = contrastive_loss(anchors[1:], positives[1:], negatives, excluded[1:])
    torch.testing.assert_close(contrastive_loss(anchors, positives, negatives, excluded), kept * 3 / 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    anchors, positives, negatives = (F.normalize(torch.randn(n, 3)).to(dtype) for n in (4, 4, 7))
    excluded = torch.rand(4, 7) < 0.3
    loss = contrastive_loss(anchors, positives, negatives, excluded)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, contrastive_loss(anchors.float(), positives.float(), negatives.float(), excluded), rtol=1e-6, atol=0
    )


def reference_loss(loss: ContrastiveLoss, seen: list[deque[Any]], batch: Batch) -> float:
    """Compute the objective with a list of earlier embeddings, and append those of the batch."""
    student, teacher, labels = batch
    total = 0.0
    for i, layer in enumerate(loss.student_layers):
        s, t = student.features[layer], teacher.features[layer]
        s, t = (x.mean((2, 3)) if x.dim() == 4 else x for x in (s, t))
        s, t = F.normalize(loss.student_embeddings[i](s)), F.normalize(loss.teacher_embeddings[i](t))
        for a, b, label in zip(s, t, labels.tolist(), strict=True):
            others = [(x, y) for x, y, other in seen[i] if label == -1 or label != other]
            for anchor, positive, negatives in ((a, b, [y for _, y in others]), (b, a, [x for x, _ in others])):
                scores = torch.stack([anchor @ other / 0.5 for other in (positive, *negatives)])
                if negatives:  # weighted as if the queue were full
                    scores[1:] += math.log(len(loss.queue_labels) / len(negatives))
                total -= scores.log_softmax(0)[0].item() / len(s)
        seen[i].extend(zip(s.detach(), t.detach(), labels.tolist(), strict=True))
    return total


@pytest.mark.parametrize("queue_size", [1, 2, 6, 7, 100])
def test_the_queue_matches_a_list_of_the_latest_embeddings(queue_size: int) -> None:
    """Also where the queue wraps around within a batch, and where a batch is larger than the queue."""
    loss = build_loss(queue_size)
    seen: list[deque[Any]] = [deque(maxlen=queue_size) for _ in "ab"]
    terms = []
    for labels in ([0, 1, 2], [1, 1, -1], [0, -1], [2, 0, 0, 1, 3], [3], [0, 1, 2, 3, 0, 1, 2, -1], [1, 2]):
        step = random_batch(labels)
        expected = reference_loss(loss, seen, step)
        terms.append(loss(*step).item())
        assert terms[-1] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert terms[0] == 0
    assert terms[-1] > 0.1


def test_images_of_the_same_class_are_not_negatives() -> None:
    loss = build_loss(layers="a")
    first, second, third, fourth = (random_batch(labels) for labels in ([1, 1], [1, 1], [2, 2], [-1, -1]))
    assert loss(*first) == 0
    loss.eval()
    assert loss(*second) == 0
    assert loss(*third) > 0
    assert loss(*fourth) > 0
    loss.train()
    loss = build_loss(layers="a")
    assert loss(*fourth) == 0
    assert loss(*fourth) > 0  # two unlabelled images are not known to be of one class


def test_probabilities_count_as_their_most_probable_class() -> None:
    one, other = build_loss(), build_loss()
    other.load_state_dict(one.state_dict())
    for labels in ([0, 1, 2, 3], [1, 1, 0, 3], [3, 2, 1, 0]):
        student, teacher, indices = random_batch(labels)
        mixed = 0.7 * F.one_hot(indices, 4) + 0.3 * F.one_hot(indices.flip(0), 4)
        assert one(student, teacher, indices) == other(student, teacher, mixed)


def test_only_training_fills_the_queue() -> None:
    loss = build_loss()
    loss.eval()
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    assert loss(*random_batch([0, 1, 2])) == 0
    torch.testing.assert_close(loss.state_dict(), before)
    loss.train()
    loss(*random_batch([0, 1, 2]))
    changed = loss.state_dict()
    assert changed["position"] == 3
    assert changed["queue_labels"].tolist() == [0, 1, 2, -2, -2, -2]
    assert not changed["queues"].requires_grad


def test_the_queue_is_saved_and_restored() -> None:
    loss, copy = build_loss(), build_loss()
    for labels in ([0, 1, 2, 3], [1, 1, 0, -1]):  # wraps around
        loss(*random_batch(labels))
    state = {name: value.clone() for name, value in loss.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in state.items() if not name.endswith("bias")}
    assert shapes == {
        "queues": (2, 2, 6, 4),
        "queue_labels": (6,),
        "position": (),
        "student_embeddings.0.weight": (4, 3),
        "student_embeddings.1.weight": (4, 5),
        "teacher_embeddings.0.weight": (4, 6),
        "teacher_embeddings.1.weight": (4, 2),
    }
    copy.load_state_dict(state)
    for labels in ([3, 3, 1], [-1, 2], [0, 1, 2, 3]):
        step = random_batch(labels)
        assert loss(*step) == copy(*step)
        torch.testing.assert_close(copy.state_dict(), loss.state_dict(), rtol=0, atol=0)


def test_backward_works_after_the_batch_has_entered_the_queue() -> None:
    loss = build_loss()
    loss(*random_batch([0, 1, 2]))
    student, teacher, labels = random_batch([1, 2, 0, 0, 3, 3, 1])
    student.features["a"].requires_grad_()
    loss(student, teacher, labels).backward()
    assert student.features["a"].grad is not None
    assert student.features["a"].grad.abs().sum() > 0


def test_defaults_match_the_released_code() -> None:
    loss = ContrastiveLoss()
    assert (loss.weight, loss.dimensions, loss.temperature, loss.warmup_epochs) == (0.8, 128, 0.07, 0)
    assert (loss.student_layers, loss.gather) == (("avgpool",), True)
    assert loss.queues.shape == (1, 2, 16384, 128)
    assert ContrastiveLoss(weight=2.0, queue_size=1, warmup_epochs=4).weight_at(0) == 0.5
    anchors, positives, negatives = (F.normalize(torch.randn(3, 4)) for _ in range(3))
    shown = torch.zeros(3, 3, dtype=torch.bool)
    value = contrastive_loss(anchors, positives, negatives, shown)
    assert value == contrastive_loss(anchors, positives, negatives, shown, temperature=0.07)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"^temperature must be above 0, got 0\.0\.$"),
        ({"temperature": float("nan")}, r"^temperature must be above 0, got nan\.$"),
        ({"dimensions": 0}, r"^dimensions and queue_size must be >= 1, got 0 and 16384\.$"),
        ({"queue_size": 0}, r"^dimensions and queue_size must be >= 1, got 128 and 0\.$"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContrastiveLoss(**options)
