"""The stored splits of a data module, and the split of training images into training and validation."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from kd_lightning.data.image_set import ImageSet, StreamedImages, with_labels
from kd_lightning.data.kept_labels import keep_labels
from kd_lightning.data.labels import is_labelled, stratum
from kd_lightning.errors import UserError

Stored = ImageSet | StreamedImages


class StoredSplits(Mapping[str, Stored]):
    """The splits that were read so far, by name; each is read once.

    Args:
        load: Reads a split, or returns ``None`` if there is no such split.
        val_fraction: Fraction of each class that is split from the training images if there is no ``"val"``.
        seed: Seed of that split.
        labels_per_class: Labels of each class that are kept of the images that are trained on; ``None`` for all.
        labels_seed: Seed of their choice.
        labelled_only: Train only on images with a label.
    """

    def __init__(
        self,
        load: Callable[[str], Stored | None],
        *,
        val_fraction: float,
        seed: int,
        labels_per_class: int | None = None,
        labels_seed: int = 0,
        labelled_only: bool = False,
    ) -> None:
        self._load = load
        self._val_fraction = val_fraction
        self._seed = seed
        self._labels_per_class = labels_per_class
        self._labels_seed = labels_seed
        self._labelled_only = labelled_only
        self._read: dict[str, Stored] = {}

    def __getitem__(self, split: str) -> Stored:
        return self._read[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)

    def read(self, split: str) -> Stored:
        """Return a split, and read it first if necessary.

        Raises:
            UserError: If there is no such split.
        """
        if split not in self._read:
            images = self._load(split)
            if images is None:
                raise UserError(f"The data module has no {split!r} images; use another command or other data.")
            self._read[split] = self._with_kept_labels(images) if split == "train" else images
        return self._read[split]

    def clear(self) -> None:
        """Forget the splits, so that they are read again."""
        self._read.clear()
        for name in ("has_val", "_divided"):
            vars(self).pop(name, None)

    @cached_property
    def has_val(self) -> bool:
        """Return whether validation images are stored, so that all training images are trained on."""
        images = self._load("val")
        if images is not None:
            self._read["val"] = images
        return images is not None

    @property
    def train_samples(self) -> Tensor:
        """The samples of ``"train"`` that are trained on."""
        labels = self.read("train").labels
        samples = torch.arange(len(labels)) if self.has_val else self._divided[0]
        if not self._labelled_only:
            return samples
        labelled = samples[is_labelled(labels[samples])]
        if not len(labelled):
            raise UserError("labelled_only leaves no training image, since none is labelled; set it to false.")
        return labelled

    @property
    def val_samples(self) -> Tensor:
        """The samples of ``"train"`` that are validated on."""
        return self._divided[1]

    @cached_property
    def _divided(self) -> tuple[Tensor, Tensor]:
        return self._divide(self.read("train").labels)

    def _divide(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        return stratified_split(labels, fraction=self._val_fraction, seed=self._seed)

    def _with_kept_labels(self, images: Stored) -> Stored:
        if self._labels_per_class is None:
            return images
        samples = torch.arange(len(images.labels))
        if not self.has_val:  # by all labels, so that the same images are validated on however many are kept
            self._divided = self._divide(images.labels)
            samples = self._divided[0]
        kept = keep_labels(images.labels, samples, per_class=self._labels_per_class, seed=self._labels_seed)
        return with_labels(images, kept)


def stratified_split(labels: Tensor, *, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split samples into training and validation by taking the same fraction of each class.

    Unlabelled samples are validated on only if no sample is labelled. Images of several classes are divided by their
    rarest one.

    Args:
        labels: Class indices ``(N,)``, -1 where unlabelled, or those of several classes, see :func:`stratum`.
        fraction: Fraction of each class that is validated on.
        seed: Seed of the choice.

    Returns:
        The training and the validation samples, both sorted.

    Example:
        >>> train, val = stratified_split(torch.tensor([0, 0, 1, 1, -1]), fraction=0.5, seed=0)
        >>> len(train), len(val)
        (3, 2)
    """
    labels, generator = stratum(labels), torch.Generator().manual_seed(seed)
    unlabelled, val = bool((labels < 0).all()), []
    for label in torch.unique(labels).tolist():
        members = (labels == label).nonzero().flatten()
        count = round(len(members) * fraction) if label >= 0 or unlabelled else 0
        val.append(members[torch.randperm(len(members), generator=generator)[:count]])
    chosen = torch.cat(val).sort().values
    left = torch.ones(len(labels), dtype=torch.bool)
    left[chosen] = False
    return left.nonzero().flatten(), chosen
