"""Results of each class, from a confusion matrix."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class ClassResult(NamedTuple):
    """The result of a class.

    Attributes:
        name: Its name.
        images: Images of the class.
        accuracy: Fraction of them that is classified correctly (recall), ``None`` without images.
        precision: Fraction of the images with its label that belongs to it, ``None`` where none got it.
        taken_for: Class that most of the others were taken for, empty where there are none.
    """

    name: str
    images: int
    accuracy: float | None
    precision: float | None
    taken_for: str


class Confusion(NamedTuple):
    """Two classes that are confused.

    Attributes:
        true: Class of the images.
        predicted: Class that they were taken for.
        images: Number of these images.
        fraction: Fraction of the images of the class.
    """

    true: str
    predicted: str
    images: int
    fraction: float


def class_results(confusion: Tensor, classes: Sequence[str]) -> list[ClassResult]:
    """Return the result of each class, in the order of the labels.

    Args:
        confusion: Counts ``(C, C)``, true classes in rows.
        classes: C names.

    Example:
        >>> import torch
        >>> class_results(torch.tensor([[3, 1], [0, 4]]), ["cat", "dog"])[0]
        ClassResult(name='cat', images=4, accuracy=0.75, precision=1.0, taken_for='dog')
    """
    counts = confusion.cpu().long()
    images, predicted, right = counts.sum(1).tolist(), counts.sum(0).tolist(), counts.diagonal().tolist()
    wrong = counts.clone().fill_diagonal_(0)
    results = []
    for label, name in enumerate(classes):
        most = int(wrong[label].argmax())
        results.append(
            ClassResult(
                name,
                images[label],
                right[label] / images[label] if images[label] else None,
                right[label] / predicted[label] if predicted[label] else None,
                classes[most] if wrong[label, most] else "",
            )
        )
    return results


def most_confused(confusion: Tensor, classes: Sequence[str], count: int) -> list[Confusion]:
    """Return the pairs of classes with most confused images, the most frequent first.

    Args:
        confusion: Counts ``(C, C)``, true classes in rows.
        classes: C names.
        count: Maximum number of pairs.

    Example:
        >>> import torch
        >>> most_confused(torch.tensor([[3, 1], [0, 4]]), ["cat", "dog"], count=5)
        [Confusion(true='cat', predicted='dog', images=1, fraction=0.25)]
    """
    counts = confusion.cpu().long()
    images = counts.sum(1).clamp(min=1)
    wrong = counts.clone().fill_diagonal_(0)
    order = wrong.flatten().argsort(descending=True, stable=True)[:count].tolist()
    pairs = [(place // len(classes), place % len(classes)) for place in order]
    return [
        Confusion(classes[i], classes[j], int(wrong[i, j]), float(wrong[i, j] / images[i]))
        for i, j in pairs
        if wrong[i, j]
    ]
