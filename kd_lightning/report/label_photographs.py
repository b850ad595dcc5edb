"""Images that may have several classes and on which the teacher and its students differ, each shown once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_lightning.callbacks.label_scores import decide
from kd_lightning.data.labels import is_labelled
from kd_lightning.files.several_labels import BETWEEN, NO_CLASS, join_labels
from kd_lightning.report.photographs import largest

Thresholds = Sequence[float]


def choose_label_images(
    labels: Tensor, logits: Sequence[Tensor], thresholds: Sequence[Thresholds], count: int
) -> tuple[list[int], list[int]]:
    """Return images of which a student gets a class wrong and the teacher right, and others on which they disagree.

    The former are those whose wrong decision is farthest from the threshold, the latter those of the largest divergence
    in a class that is decided otherwise.

    Args:
        labels: 1 for each class of an image and 0 for the others, ``(N, C)``, with rows of -1 where unlabelled.
        logits: Logits ``(N, C)`` of the teacher, then of each student.
        thresholds: Thresholds of each of them.
        count: Maximum number of either.

    Example:
        >>> teacher, labels = torch.tensor([[2.0, -2.0], [-2.0, -2.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> choose_label_images(labels, [teacher, -teacher], [[0.5, 0.5]] * 2, count=5)
        ([0, 1], [])
    """
    decisions = [decide(values, cut) for values, cut in zip(logits, thresholds, strict=True)]
    right = (decisions[0] == (labels > 0)) & is_labelled(labels)[:, None]
    errors, divergences = [], []
    for values, cut, given in zip(logits[1:], thresholds[1:], decisions[1:], strict=True):
        probabilities, taught = values.double().sigmoid(), logits[0].double().sigmoid()
        differs = given != decisions[0]
        wrong = ((probabilities - torch.as_tensor(cut, dtype=torch.float64)).abs() * (right & differs)).max(1).values
        errors.append(wrong.tolist())
        far = ((probabilities - taught).abs().clamp(min=1e-12) * differs).max(1).values
        divergences.append(torch.where(wrong > 0, 0.0, far).tolist())
    first = largest(errors, count)
    return first, [place for place in largest(divergences, count + len(first)) if place not in first][:count]


def describe_label_image(
    number: int,
    labels: Tensor,
    logits: Sequence[Tensor],
    thresholds: Sequence[Thresholds],
    names: Sequence[str],
    classes: Sequence[str],
) -> str:
    """Return the caption of an image, in lines: its classes, and each answer with the models that give it.

    Args:
        number: Number of the image.
        labels: 1 for each class of an image and 0 for the others, ``(N, C)``, with rows of -1 where unlabelled.
        logits: Logits ``(N, C)`` of each model.
        thresholds: Thresholds of each model.
        names: Names of the models.
        classes: Class names.

    Example:
        >>> logits = [torch.tensor([[2.0, 1.0]]), torch.tensor([[-1.0, 1.0]])]
        >>> names, labels = ["teacher", "small.onnx"], torch.tensor([[1.0, 1.0]])
        >>> print(describe_label_image(0, labels, logits, [[0.5, 0.5]] * 2, names, ["ant", "tall"]))
        Test image 0, labelled ant;tall
        ant;tall: teacher (88;73%)
        tall: small.onnx (73%)
    """
    opinions: dict[str, list[str]] = {}
    for name, output, chosen in zip(names, logits, thresholds, strict=True):
        given = decide(output[number], chosen).tolist()
        per_cent = (100 * output[number].double().sigmoid()).tolist()
        text, values = join_labels(given, per_cent, classes, digits=0)
        opinions.setdefault(text, []).append(f"{name} ({values}%)" if values else name)
    own = BETWEEN.join(name for name, value in zip(classes, labels[number].tolist(), strict=True) if value > 0)
    label = f"labelled {own or NO_CLASS}" if is_labelled(labels[number : number + 1]) else "unlabelled"
    answers = [f"{text}: {', '.join(who)}" for text, who in opinions.items()]
    return "\n".join([f"Test image {number}, {label}", *answers])
