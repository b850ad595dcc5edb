"""The picture of the accuracy of each class."""

from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

_MOST = 20
"""Classes that are drawn."""


@rc_context({"text.parse_math": False})  # $ in a name is a dollar
def class_accuracy_figure(counts: Tensor, *, classes: Sequence[str]) -> Figure:
    """Draw the accuracy of each class, the lowest first, and the class that it is most often taken for.

    Args:
        counts: Confusion matrix, counts ``(C, C)``, true classes in rows.
        classes: Class names in the order of the labels.
    """
    rows = class_accuracies(counts)[:_MOST]
    figure = Figure(figsize=(5.2, 1.2 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [100 * accuracy for _, accuracy, _, _ in rows], color="#9ecae1")
    axes.set_yticks(places, [f"{short_name(classes[label])} ({count})" for label, _, count, _ in rows])
    for place, (_, accuracy, _, other) in zip(places, rows, strict=True):
        mistaken = "" if other is None else f", most often taken for {short_name(classes[other])}"
        axes.text(1, place, f"{100 * accuracy:.1f}%{mistaken}", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy (%)")
    shown = "" if len(rows) == len(counts) else f", the {len(rows)} lowest of {len(counts)}"
    figure.suptitle(f"Accuracy of each class (number of images){shown}", fontsize=11)
    return figure


def class_accuracies(counts: Tensor) -> list[tuple[int, float, int, int | None]]:
    """Return, for each class with images, its number, accuracy, number of images and most frequent mistake.

    Args:
        counts: Confusion matrix, counts ``(C, C)``, true classes in rows.

    Returns:
        The lowest accuracy first; ``None`` for a class without mistakes.

    Example:
        >>> import torch
        >>> class_accuracies(torch.tensor([[3, 0, 1], [0, 2, 0], [0, 0, 0]]))
        [(0, 0.75, 4, 2), (1, 1.0, 2, None)]
    """
    counts = counts.cpu()
    wrong = counts.clone().fill_diagonal_(0)
    rows = []
    for label, (row, mistakes) in enumerate(zip(counts, wrong, strict=True)):
        count, other = int(row.sum()), int(mistakes.argmax())
        if count:
            rows.append((label, float(row[label]) / count, count, other if mistakes[other] else None))
    return sorted(rows, key=lambda row: (row[1], row[0]))


def short_name(name: str) -> str:
    """Return a class name in one line, of at most 18 characters."""
    name = " ".join(name.split())
    return name if len(name) <= 18 else f"{name[:17]}…"
