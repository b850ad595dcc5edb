"""Divides one labelled set into training, validation and test images, and keeps that division in checkpoints."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kd_lightning.data.labels import stratum


class Partition(NamedTuple):
    """The part of each sample of a set.

    Attributes:
        parts: Samples of ``"train"``, ``"val"`` and ``"test"``, each sorted.
        changed: Differences of the set since the partition was drawn, for a message; empty if there are none.
    """

    parts: dict[str, Tensor]
    changed: str = ""


def draw_partition(labels: Tensor, *, val_fraction: float, test_fraction: float, seed: int) -> Partition:
    """Draw the same fractions of each class, and at least one image each from classes of three or more.

    Args:
        labels: int64 ``(N,)``, or those of several classes, of which the rarest counts, see :func:`stratum`.
        val_fraction: Fraction of each class that is validated on.
        test_fraction: Fraction of each class that is tested on.
        seed: Seed of the choice.

    Example:
        >>> drawn = draw_partition(torch.arange(40) % 2, val_fraction=0.1, test_fraction=0.1, seed=0)
        >>> {name: len(samples) for name, samples in drawn.parts.items()}
        {'train': 32, 'val': 4, 'test': 4}
    """
    labels, generator = stratum(labels), torch.Generator().manual_seed(seed)
    chosen: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}
    for label in torch.unique(labels).tolist():
        members = (labels == label).nonzero().flatten()
        least = int(len(members) >= 3)
        test, val = (max(least, round(len(members) * fraction)) for fraction in (test_fraction, val_fraction))
        order = members[torch.randperm(len(members), generator=generator)]
        for name, part in zip(("test", "val", "train"), order.tensor_split([test, test + val]), strict=True):
            chosen[name].append(part)
    return Partition({name: torch.cat(parts).sort().values for name, parts in chosen.items()})


def save_partition(partition: Partition, names: Sequence[str]) -> dict[str, Any]:
    """Return a partition as plain data for a checkpoint.

    Args:
        partition: The partition.
        names: Name of each sample, by which it is recognized.
    """
    held_out = {name: [names[sample] for sample in partition.parts[name].tolist()] for name in ("val", "test")}
    return {**held_out, "count": len(names), "digest": _digest(names)}


def restore_partition(saved: dict[str, Any], names: Sequence[str]) -> Partition:
    """Return the partition of a checkpoint; new samples are trained on.

    Args:
        saved: From :func:`save_partition`.
        names: Name of each sample now.
    """
    place = {name: sample for sample, name in enumerate(names)}
    parts = {
        split: torch.tensor(sorted(place[name] for name in saved[split] if name in place), dtype=torch.int64)
        for split in ("val", "test")
    }
    kept = torch.ones(len(names), dtype=torch.bool)
    kept[torch.cat(list(parts.values()))] = False
    changed = ""
    if saved["digest"] != _digest(names):
        lost = {split: len(saved[split]) - len(samples) for split, samples in parts.items()}
        changed = (
            f"it had {saved['count']} labelled images and has {len(names)}; {lost['val']} of the validation and "
            f"{lost['test']} of the test images are gone, and new images are only trained on"
        )
    return Partition({"train": kept.nonzero().flatten(), **parts}, changed)


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
