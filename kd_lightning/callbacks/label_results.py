"""Results of each class where an image may have several, by name."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kd_lightning.callbacks.label_scores import LabelScores
from kd_lightning.networks.data_config import data_config, thresholds_or_default


class LabelResult(NamedTuple):
    """The result of a class.

    Attributes:
        name: Its name.
        images: Images that have the class.
        average_precision: ``None`` for a class that no image has.
        f1: F1 of the decisions at the threshold, ``None`` for a class that no image has.
        precision: Fraction of the images that are given the class which have it, ``None`` where none is.
        recall: Fraction of the images that have the class which are given it, ``None`` where none has.
        threshold: Probability above which an image is given the class.
    """

    name: str
    images: int
    average_precision: float | None
    f1: float | None
    precision: float | None
    recall: float | None
    threshold: float


def label_results(scores: LabelScores, classes: Sequence[str], thresholds: Sequence[float]) -> list[LabelResult]:
    """Return the result of each class, in the order of the labels.

    Args:
        scores: Scores of the classes.
        classes: C names.
        thresholds: Their thresholds.

    Example:
        >>> import torch
        >>> from kd_lightning.callbacks.label_scores import label_scores
        >>> scores = label_scores(torch.tensor([[2.0], [-1.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([0.5]))
        >>> label_results(scores, ["cat"], [0.5])
        [LabelResult(name='cat', images=1, average_precision=1.0, f1=1.0, precision=1.0, recall=1.0, threshold=0.5)]
    """
    values = (scores.average_precision, scores.f1, scores.precision, scores.recall)
    columns = zip(classes, scores.images.tolist(), *map(_numbers, values), thresholds, strict=True)
    return [LabelResult(*row) for row in columns]


def named_label_results(pl_module: Any, data: object) -> list[LabelResult]:
    """Return the result of each class of a module's last evaluation; without names of the data those of the network.

    Args:
        pl_module: Module whose ``label_scores`` are not ``None``.
        data: Its data module, if there is one.
    """
    known = data_config(pl_module.network)
    count = len(pl_module.label_scores.images)
    names = getattr(data, "classes", None) or known.classes or range(count)
    thresholds = thresholds_or_default(known.thresholds, count)
    return label_results(pl_module.label_scores, list(map(str, names)), thresholds)


def _numbers(values: Tensor) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]
