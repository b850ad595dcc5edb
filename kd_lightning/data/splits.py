"""The stored splits of a data module, and the split of training images into training and validation."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from kd_lightning.data.image_set import ImageSet, StreamedImages
from kd_lightning.errors import UserError

Stored = ImageSet | StreamedImages


class StoredSplits(Mapping[str, Stored]):
    """The splits that were read so far, by name; each is read once.

    Args:
        load: Reads a split, or returns ``None`` if there is no such split.
        val_fraction: Fraction of each class that is split from the training images if there is no ``"val"``.
        seed: Seed of that split.
    """

    def __init__(self, load: Callable[[str], Stored | None], *, val_fraction: float, seed: int) -> None:
        self._load = load
        self._val_fraction = val_fraction
        self._seed = seed
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
            self._read[split] = images
        return self._read[split]

    def clear(self) -> None:
        """Forget the splits, so that they are read again."""
        self._read.clear()
        for name in ("has_val", "_samples"):
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
        return torch.arange(len(self.read("train").labels)) if self.has_val else self._samples[0]

    @property
    def val_samples(self) -> Tensor:
        """The samples of ``"train"`` that are validated on."""
        return self._samples[1]

    @cached_property
    def _samples(self) -> tuple[Tensor, Tensor]:
        return stratified_split(self.read("train").labels, fraction=self._val_fraction, seed=self._seed)


def stratified_split(labels: Tensor, *, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split samples into training and validation by taking the same fraction of each class.

    Unlabelled samples are validated on only if no sample is labelled.

    Args:
        labels: int64 ``(N,)``, -1 where unlabelled.
        fraction: Fraction of each class that is validated on.
        seed: Seed of the choice.

    Returns:
        The training and the validation samples, both sorted.

    Example:
        >>> train, val = stratified_split(torch.tensor([0, 0, 1, 1, -1]), fraction=0.5, seed=0)
        >>> len(train), len(val)
        (3, 2)
    """
    generator = torch.Generator().manual_seed(seed)
    unlabelled, val = bool((labels < 0).all()), []
    for label in torch.unique(labels).tolist():
        members = (labels == label).nonzero().flatten()
        count = round(len(members) * fraction) if label >= 0 or unlabelled else 0
        val.append(members[torch.randperm(len(members), generator=generator)[:count]])
    chosen = torch.cat(val).sort().values
    left = torch.ones(len(labels), dtype=torch.bool)
    left[chosen] = False
    return left.nonzero().flatten(), chosen
