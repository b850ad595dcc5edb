"""A choice of a few labelled images of each class, as where labels are expensive and images are not."""

import torch
from torch import Tensor

from kd_lightning.errors import UserError


def keep_labels(labels: Tensor, samples: Tensor, *, per_class: int, seed: int) -> Tensor:
    """Return labels of which, among some samples, only a few of each class are kept; the other samples get -1.

    Of images of several classes as many are kept that each class has at least ``per_class`` of them; the rarest classes
    choose first, so frequent ones may have more.

    Args:
        labels: Class indices, int64 ``(N,)``, -1 where unlabelled; or 1 for each class of an image and 0 for the
            others, ``(N, C)``, with rows of -1 where unlabelled.
        samples: Samples to choose from, int64 ``(n,)``; all others keep their labels.
        per_class: Labels of each class that are kept.
        seed: Seed of the choice.

    Raises:
        UserError: If a class has fewer labels among the samples.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 1, 1, 1, 1])
        >>> kept = keep_labels(labels, torch.arange(6), per_class=2, seed=0)
        >>> [(kept[:6] == label).sum().item() for label in (0, 1, -1)], kept[6].item()
        ([2, 2, 2], 1)
    """
    generator = torch.Generator().manual_seed(seed)
    if labels.dim() == 2:
        return _keep_several(labels, samples, per_class, generator)
    kept = labels.clone()
    kept[samples] = -1
    for label in torch.unique(labels[samples]).tolist():
        members = samples[labels[samples] == label]
        if label < 0:
            continue
        _check_enough(label, len(members), per_class)
        kept[members[torch.randperm(len(members), generator=generator)[:per_class]]] = label
    return kept


def _keep_several(labels: Tensor, samples: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    has = labels[samples] > 0
    counts = has.sum(0)
    chosen = torch.zeros(len(samples), dtype=torch.bool)
    for label in counts.argsort(stable=True).tolist():
        _check_enough(label, int(counts[label]), per_class)
        others = (has[:, label] & ~chosen).nonzero().flatten()
        missing = max(0, per_class - int((has[:, label] & chosen).sum()))
        chosen[others[torch.randperm(len(others), generator=generator)[:missing]]] = True
    kept = labels.clone()
    kept[samples[~chosen]] = -1
    return kept


def _check_enough(label: int, count: int, per_class: int) -> None:
    if count < per_class:
        raise UserError(
            f"labels_per_class is {per_class}, but class {label} has {count} labelled training images; "
            f"set it to {count} or less, or provide more images."
        )
