"""A choice of a few labelled images of each class, as where labels are expensive and images are not."""

import torch
from torch import Tensor

from kd_lightning.errors import UserError


def keep_labels(labels: Tensor, samples: Tensor, *, per_class: int, seed: int) -> Tensor:
    """Return labels of which, among some samples, only a few of each class are kept; the other samples get -1.

    Args:
        labels: Class indices, int64 ``(N,)``, -1 where unlabelled.
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
    kept = labels.clone()
    kept[samples] = -1
    for label in torch.unique(labels[samples]).tolist():
        members = samples[labels[samples] == label]
        if label < 0:
            continue
        if len(members) < per_class:
            raise UserError(
                f"labels_per_class is {per_class}, but class {label} has {len(members)} labelled training images; "
                f"set it to {len(members)} or less, or provide more images."
            )
        kept[members[torch.randperm(len(members), generator=generator)[:per_class]]] = label
    return kept
