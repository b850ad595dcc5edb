"""Batches of any loader, as modules and callbacks read them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kd_lightning.data.batch import Batch, LoadedBatch
from kd_lightning.errors import UserError

_WANTED = "A batch must be (images, labels) with images (B, channels, H, W)"


def read_training_batch(batch: Any, *, pairs: bool, multi_label: bool = False) -> tuple[LoadedBatch, Tensor | None]:
    """Return a batch to train on, and the target's images where batches are pairs of domains.

    Args:
        batch: ``(images, labels, ...)``, or with ``pairs`` ``{"source": (images, labels, ...), "target": images}``.
        pairs: Whether the module trains on pairs of domains.
        multi_label: Whether the data declare that an image may have several classes.

    Raises:
        UserError: If it is anything else.
    """
    if not pairs:
        return read_batch(batch, multi_label=multi_label), None
    if not isinstance(batch, Mapping) or not {"source", "target"} <= batch.keys():
        raise UserError(
            'AdaptationModule trains on batches {"source": (images, labels), "target": images}, got '
            f"{_describe(batch)}; give the Trainer a dict of two loaders with these keys, or a DomainPairDataModule."
        )
    source, target = read_batch(batch["source"]), read_images(batch["target"])
    if source.images.shape[1:] != target.shape[1:]:
        raise UserError(
            f"The source's images are {_describe(source.images)} and the target's {_describe(target)}; give both the "
            "same channels and size."
        )
    return source, target


def read_batch(batch: Any, *, labelled: bool = True, multi_label: bool = False) -> LoadedBatch:
    """Return a batch of any loader with labels as the losses take them; what its values are is not checked.

    Args:
        batch: ``(images, labels)`` or ``(images, labels, ids)``; ids that are no integers ``(B,)``, and what follows
            them, are ignored.
        labelled: Whether there must be labels; otherwise they are -1 where there are none.
        multi_label: Whether the data declare that an image may have several classes: labels are then ``(B, C)``, of any
            type, and are returned as floats.

    Raises:
        UserError: If it is anything else.

    Example:
        >>> read_batch([torch.rand(2, 3, 8, 8), torch.tensor([[1], [4]], dtype=torch.uint8), ("a.png", "b.png")])[1:3]
        (tensor([1, 4]), None)
    """
    if isinstance(batch, Batch):
        return LoadedBatch(*batch)
    images = read_images(batch)
    labels = _element(batch, 1)
    if labels is None and not labelled:
        unlabelled = torch.full((len(images),), -1, device=images.device)
        return LoadedBatch(images, unlabelled, _read_ids(batch, images))
    read = _read_several if multi_label else _read_labels
    return LoadedBatch(images, read(labels, batch, images), _read_ids(batch, images))


def read_to_predict(batch: Any) -> LoadedBatch:
    """Return a batch whose labels are not used: they are not checked, and -1 where there is no tensor of them.

    Args:
        batch: ``(images, labels, ids)``, without labels or ids, or only the images.

    Raises:
        UserError: If it is anything else.

    Example:
        >>> read_to_predict(torch.rand(2, 3, 8, 8)).labels
        tensor([-1, -1])
    """
    if isinstance(batch, Batch):
        return LoadedBatch(*batch)
    images, labels = read_images(batch), _element(batch, 1)
    if not isinstance(labels, Tensor) or labels.shape[:1] != images.shape[:1]:
        labels = torch.full((len(images),), -1, device=images.device)
    return LoadedBatch(images, labels, _read_ids(batch, images))


def read_images(batch: Any) -> Tensor:
    """Return the images of a batch, floats ``(B, channels, H, W)``.

    Args:
        batch: ``(images, ...)``, or only the images.

    Raises:
        UserError: If it is anything else.
    """
    images = _element(batch, 0)
    if not isinstance(images, Tensor) or images.dim() != 4:
        raise UserError(f"{_WANTED}, got {_describe(batch)}; {_advice(batch)}.")
    if not images.is_floating_point():
        raise UserError(
            f"The images of a batch are {_name(images.dtype)}, but networks take normalized floats; convert them in "
            "the data set's transform, for example by ToDtype(torch.float32, scale=True) and Normalize(mean, std)."
        )
    return images


def check_channels(images: Tensor, expected: tuple[int, ...] | None) -> None:
    """Check that images have as many channels as those before.

    Args:
        images: ``(B, channels, H, W)``.
        expected: Channels, height and width of images that the network has seen, if it has.

    Raises:
        UserError: If they do not.
    """
    if expected is not None and images.shape[1] != expected[0]:
        raise UserError(
            f"A batch has images of {images.shape[1]} channels, but those before had {expected[0]}; convert all in the "
            f"data set, for example by image.convert({'L' if expected[0] == 1 else 'RGB'!r})."
        )


def _read_labels(labels: object, batch: Any, images: Tensor) -> Tensor:
    if labels is None:
        raise UserError(f"{_WANTED}, got {_describe(batch)} without labels; {_advice(batch)}.")
    count = len(images)
    if not isinstance(labels, Tensor):
        raise UserError(f"The labels of a batch are {_describe(labels)}; give an integer tensor ({count},).")
    if labels.shape == (count, 1):
        labels = labels[:, 0]
    if labels.dim() == 2 and len(labels) == count:
        if labels.is_floating_point():
            return labels
        raise UserError(
            f"The labels of a batch are {_describe(labels)}, one column for each class; give labels.argmax(1) for rows "
            "with a single 1, or labels.float() for class probabilities; if an image may have several classes, declare "
            "multi_label = True in the data module."
        )
    if labels.shape != (count,):
        raise UserError(f"The labels of a batch of {count} images are {_describe(labels)}; give integers ({count},).")
    if labels.is_floating_point() or labels.is_complex():
        raise UserError(
            f"The labels of a batch are {_name(labels.dtype)}, but class indices are integers; give labels.long(), or "
            "class probabilities (B, C)."
        )
    return labels.long()


def _read_several(labels: object, batch: Any, images: Tensor) -> Tensor:
    """Return labels of several classes as floats ``(B, C)``."""
    if labels is None:
        raise UserError(f"{_WANTED}, got {_describe(batch)} without labels; {_advice(batch)}.")
    rows = isinstance(labels, Tensor) and labels.dim() == 2 and len(labels) == len(images)
    if isinstance(labels, Tensor) and rows and not labels.is_complex():
        return labels if labels.is_floating_point() else labels.float()
    raise UserError(
        f"The labels of a batch of {len(images)} images are {_describe(labels)}, but the data declare multi_label; "
        f"give ({len(images)}, C), 1 for each class of an image and 0 for the others."
    )


def _read_ids(batch: Any, images: Tensor) -> Tensor | None:
    ids = _element(batch, 2)
    integers = isinstance(ids, Tensor) and not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    return ids if isinstance(ids, Tensor) and integers and ids.shape == images.shape[:1] else None


def _element(batch: Any, number: int) -> object:
    """Return an element of a batch, ``None`` where there is none; a tensor alone is the images."""
    if not isinstance(batch, tuple | list):
        return batch if number == 0 else None
    return batch[number] if number < len(batch) else None


def _advice(batch: Any) -> str:
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(parts, tuple | list) and len(parts) > 1 and all(isinstance(part, tuple | list) for part in parts):
        return "give one loader, not several that are read together (ConcatDataset joins data sets)"
    if isinstance(parts, tuple | list) and [getattr(part, "ndim", 0) for part in parts[:2]] == [3, 0]:
        return "give a DataLoader, not the data set itself"
    return "change what the data set returns, or the collate_fn"


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{_name(value.dtype)} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(repr, value))}"
    if isinstance(value, tuple | list) and value:
        parts = [_describe(part) for part in value[:4]]
        return f"[{', '.join([*parts, *(['...'] if len(value) > 4 else [])])}]"
    return "an empty list" if isinstance(value, tuple | list) else "None" if value is None else type(value).__name__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
