"""Some training images in the views of the first epochs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from kd_lightning.callbacks.image_grid import label_captions
from kd_lightning.data.batch import RawBatch, finished
from kd_lightning.data.image_set import Subset
from kd_lightning.data.read_batch import read_batch


class Views(NamedTuple):
    """Views of some images, those of one image after another.

    Attributes:
        images: Normalized floats ``(n * epochs, channels, H, W)``.
        captions: The class and the epoch of each.
        epochs: Number of views of an image.
    """

    images: Tensor
    captions: list[str]
    epochs: int


def first_views(trainer: pl.Trainer, classes: Sequence[str], *, count: int = 4, epochs: int = 8) -> Views | None:
    """Return the views that the first epochs show of the first training images.

    A view is a function of (seed, sample, epoch), so these are the images that are trained on. Nothing random is drawn,
    and no loader moves.

    Args:
        trainer: Trainer that fits.
        classes: Names of the classes.
        count: Number of images.
        epochs: Number of epochs; fewer if the data module has fewer views, or the run is shorter.

    Returns:
        ``None`` for loaders of other data modules, and for two domains.
    """
    dataset: Any = getattr(trainer.train_dataloader, "dataset", None)
    if not isinstance(dataset, Subset) or dataset.domain:
        return None
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    shown = [number for number in (epochs, data.views, trainer.max_epochs) if number is not None and number > 0]
    count = min(count, len(dataset))
    parts = []
    for epoch in range(min(shown)):
        raw = dataset.__getitems__([(position, epoch) for position in range(count)])
        if not isinstance(raw, RawBatch):  # an image cannot be read, which the loader will report
            return None
        batch = finished(trainer.strategy.batch_to_device(raw), data)
        parts.append(read_batch(batch, labelled=False))
    # of two views in a batch the first
    images = torch.stack([part.images[:count].detach().cpu() for part in parts], dim=1).flatten(0, 1)
    captions = [label_captions(part.labels[:count], classes, multi_label=data.multi_label) for part in parts]
    return Views(
        images,
        [f"{captions[epoch][row]}\nepoch {epoch}" for row in range(count) for epoch in range(len(parts))],
        len(parts),
    )
