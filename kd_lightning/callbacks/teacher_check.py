"""A look at the teacher before anything is learned from it."""

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from torch import Tensor


def wilson_interval(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share, E. B. Wilson, 1927.

    Example:
        >>> [round(end, 3) for end in wilson_interval(50, 100)]
        [0.404, 0.596]
    """
    share, spread = right / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def accuracy_on_val(trainer: Any, classify: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """Right answers and labelled images over the validation loaders of all ranks.

    Args:
        trainer: A ``Trainer`` that is about to fit.
        classify: Images to logits, called without gradient.
    """
    loaders = trainer.val_dataloaders
    loaders = loaders if isinstance(loaders, list | tuple) else [] if loaders is None else [loaders]
    counts = torch.zeros(2, dtype=torch.int64, device=trainer.strategy.root_device)
    with torch.no_grad():
        for loader, limit in zip(loaders, trainer.num_val_batches, strict=False):
            for index, batch in enumerate(loader):
                if index >= limit:
                    break
                images, labels, *_ = trainer.strategy.batch_to_device(batch)
                counts += torch.stack([(classify(images).argmax(1) == labels).sum(), (labels >= 0).sum()])
    right, count = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
    return right, count


def refuse_guessing(right: int, count: int, num_classes: int) -> str | None:
    """Why a teacher should not be learned from, or ``None`` where it is better than chance."""
    low, high = wilson_interval(right, count)
    if low > 1 / num_classes:
        return None
    return (
        f"The teacher gets {right} of {count} validation images right ({low:.1%} to {high:.1%}), no better than chance "
        f"({1 / num_classes:.1%}); check its weights, the order of its classes and its input statistics, or set "
        "teacher_check='off'."
    )
