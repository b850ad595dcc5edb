"""Scores of each class where an image may have several, and the thresholds of their probabilities."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kd_lightning.networks.data_config import DEFAULT_THRESHOLD, truncate

FEWEST_IMAGES = 5
"""Validation images with a class, and without it, from which its threshold is chosen."""


class LabelScores(NamedTuple):
    """Scores of each class at the thresholds.

    Attributes:
        labelled: Number of labelled images, a scalar.
        images: Those that have the class, int64 ``(C,)``.
        average_precision: ``(C,)``, NaN for a class that no image has.
        f1: ``(C,)``, NaN for a class that no image has.
        precision: ``(C,)``, NaN for a class that no image is given.
        recall: ``(C,)``, NaN for a class that no image has.
        f1_micro: F1 of the decisions on all classes, a scalar; NaN if no image has a class.
    """

    labelled: Tensor
    images: Tensor
    average_precision: Tensor
    f1: Tensor
    precision: Tensor
    recall: Tensor
    f1_micro: Tensor

    @property
    def averages(self) -> dict[str, Tensor]:
        """The metrics over all classes that an image has, by name; empty if there is none."""
        there = self.images > 0
        if not there.any():
            return {}
        means = {"map": self.average_precision, "f1_macro": self.f1}
        return {**{name: values[there].mean() for name, values in means.items()}, "f1_micro": self.f1_micro}


def decide(logits: Tensor, thresholds: Tensor | Sequence[float]) -> Tensor:
    """Return which classes images are given, bool ``(N, C)``: those whose probability is above the threshold.

    Args:
        logits: ``(N, C)``.
        thresholds: C probabilities.

    Example:
        >>> decide(torch.tensor([[2.0, 0.0]]), [0.5, 0.5])
        tensor([[ True, False]])
    """
    return logits.double().sigmoid() > torch.as_tensor(thresholds, dtype=torch.float64, device=logits.device)


def label_scores(logits: Tensor, labels: Tensor, thresholds: Tensor) -> LabelScores:
    """Return the scores of labelled images: average precision of the order of the logits, F1 of the decisions.

    Classes that no image has are left out of the averages.

    Args:
        logits: ``(N, C)``.
        labels: 1 for each class of an image and 0 for the others, ``(N, C)``; of fractions those from 1/2 on count.
        thresholds: Probabilities ``(C,)``.

    Example:
        >>> logits, labels = torch.tensor([[2.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> scores = label_scores(logits, labels, torch.tensor([0.5, 0.5]))
        >>> scores.average_precision, scores.averages["f1_micro"]
        (tensor([1., nan]), tensor(0.5000))
    """
    from torchmetrics.functional.classification import multilabel_average_precision, multilabel_f1_score

    has, given = labels >= DEFAULT_THRESHOLD, decide(logits, thresholds)
    images, right = has.sum(0), (has & given).sum(0)
    there = (images > 0).nonzero().flatten()
    precisions, f1 = (torch.full(images.shape, torch.nan, device=logits.device) for _ in range(2))
    f1_micro = precisions.new_tensor(torch.nan)
    if len(there):
        # of float64, in which near probabilities differ too
        scores, targets = logits.double().sigmoid()[:, there], has[:, there].long()
        count = len(there)
        precisions[there] = multilabel_average_precision(scores, targets, count, average=None, validate_args=False).to(
            precisions
        )
        decisions = given[:, there].long()
        f1[there] = multilabel_f1_score(decisions, targets, count, average=None, validate_args=False).to(f1)
        total = len(images)
        f1_micro = multilabel_f1_score(given.long(), has.long(), total, average="micro", validate_args=False).to(f1)
    labelled = images.new_tensor(len(labels))
    return LabelScores(labelled, images, precisions, f1, _ratio(right, given.sum(0)), _ratio(right, images), f1_micro)


def choose_thresholds(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the probability of each class above which F1 is highest on these images, float64 ``(C,)``.

    Of several such probabilities the nearest to 1/2 is chosen. Between two probabilities of images that are divided it
    is their mean, or 1/2 if that lies between them. Of a class that fewer than :data:`FEWEST_IMAGES` images have, or
    lack, it is 1/2: the best one would be that of single images.

    Args:
        logits: Logits of labelled images, ``(N, C)``.
        labels: 1 for each class of an image and 0 for the others, ``(N, C)``.

    Example:
        >>> logits = torch.tensor([-1.0] * 5 + [-3.0] * 5)[:, None]
        >>> choose_thresholds(logits, (logits > -2).float())
        tensor([0.1582], dtype=torch.float64)
    """
    count, classes = logits.shape
    if not count:
        return torch.full((classes,), DEFAULT_THRESHOLD, dtype=torch.float64, device=logits.device)
    probabilities, order = logits.double().sigmoid().sort(dim=0, descending=True, stable=True)
    has = labels >= DEFAULT_THRESHOLD
    right, images = has.gather(0, order).cumsum(0), has.sum(0)
    given = torch.arange(1, count + 1, device=logits.device)[:, None]
    f1 = 2 * right / (given + images)  # of the first, of the first two, ... that are given the class
    below = torch.cat([probabilities[1:], torch.zeros_like(probabilities[:1])])
    middle = (probabilities + below) / 2
    between = (below <= DEFAULT_THRESHOLD) & (probabilities > DEFAULT_THRESHOLD)
    candidates = torch.where(between, DEFAULT_THRESHOLD, middle)
    f1 = torch.where(below < probabilities, f1, -1.0)  # equal ones cannot be divided
    best = f1 >= f1.max(0).values - 1e-12
    distance = torch.where(best, (candidates - DEFAULT_THRESHOLD).abs(), torch.inf)
    chosen = candidates.gather(0, distance.argmin(0)[None])[0]
    enough = (images >= FEWEST_IMAGES) & (count - images >= FEWEST_IMAGES)
    return torch.where(enough, chosen, DEFAULT_THRESHOLD)


def describe_unchosen(scores: LabelScores, classes: Sequence[str] | None) -> str:
    """Return a sentence about the classes whose threshold is not chosen, empty if there are none.

    Args:
        scores: Scores of the validation images.
        classes: Class names, if they are known.
    """
    images = scores.images.tolist()
    labelled = int(scores.labelled)
    few = [label for label, n in enumerate(images) if not FEWEST_IMAGES <= n <= labelled - FEWEST_IMAGES]
    if not few:
        return ""
    names = [classes[label] if classes else str(label) for label in few]
    stay = f"threshold of {truncate(names)} stays" if len(few) == 1 else f"thresholds of {truncate(names)} stay"
    return (
        f"The {stay} {DEFAULT_THRESHOLD}: choosing one takes {FEWEST_IMAGES} validation images with the class and as "
        f"many without it (there are {labelled} images)."
    )


def shuffled_map(logits: Tensor, labels: Tensor, *, count: int = 200) -> Tensor:
    """Return the mean average precision of ``count`` orders of the images at random, float64 ``(count,)``.

    Args:
        logits: Logits of labelled images, ``(N, C)``.
        labels: 1 for each class of an image and 0 for the others, ``(N, C)``; at least one image has a class.
        count: Number of orders.
    """
    has, generator = (labels >= DEFAULT_THRESHOLD).double(), torch.Generator().manual_seed(0)
    order = logits.argsort(0, descending=True)
    shuffled = (has[torch.randperm(len(has), generator=generator)] for _ in range(count))
    return torch.stack([_map(rows.gather(0, order)) for rows in shuffled])


def resampled_map(logits: Tensor, labels: Tensor, *, count: int = 200) -> Tensor:
    """Return the mean average precision of ``count`` sets of as many images, drawn with replacement, float64.

    Their quantiles are a confidence interval (the bootstrap of B. Efron, 1979). A set without any class is left out.

    Args:
        logits: Logits of labelled images, ``(N, C)``.
        labels: 1 for each class of an image and 0 for the others, ``(N, C)``; at least one image has a class.
        count: Number of sets.
    """
    has, generator = (labels >= DEFAULT_THRESHOLD).double(), torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        rows = torch.randint(len(has), (len(has),), generator=generator)
        found.append(_map(has[rows].gather(0, logits[rows].argsort(0, descending=True))))
    values = torch.stack(found)
    return values[~values.isnan()]


def _map(ranked: Tensor) -> Tensor:
    """Return the mean average precision over the classes that an image has, NaN without any.

    Args:
        ranked: Whether images have each class, in the order of its logits, float64 ``(N, C)``.
    """
    places = torch.arange(1, len(ranked) + 1, device=ranked.device, dtype=ranked.dtype)[:, None]
    return ((ranked * ranked.cumsum(0) / places).sum(0) / ranked.sum(0)).nanmean()


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Return quotients, NaN where there is nothing to divide."""
    return torch.where(whole > 0, part / whole.clamp(min=1), torch.nan)
