"""Batches before and after they are augmented on the device."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """A batch of images, as modules see it.

    Attributes:
        images: Normalized floats ``(B, channels, H, W)``.
        labels: Class indices ``(B,)``, -1 where unlabelled; class probabilities ``(B, C)`` under mixup and CutMix.
        ids: ``sample * V + view``, int64 ``(B,)``, with samples numbered over the full stored set and V fixed views of
            each (1: the sample itself).
    """

    images: Tensor
    labels: Tensor
    ids: Tensor


class LoadedBatch(NamedTuple):
    """A batch of any loader, as modules see it.

    Attributes:
        images: Normalized floats ``(B, channels, H, W)``.
        labels: Class indices, int64 ``(B,)``, -1 where unlabelled; or class probabilities ``(B, C)``.
        ids: Integers ``(B,)``; see :class:`Batch`. ``None`` where the loader gives none.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor | None


class RawBatch(NamedTuple):
    """A batch on its way to the device, where it becomes a :class:`Batch`.

    Attributes:
        pixels: uint8 ``(B, channels, H, W)`` of a streamed set, ``(B, 0)`` of a set that is kept on the device.
        labels: Class indices ``(B,)``.
        ids: int64 ``(B,)``, samples numbered over the stored set.
        epoch: Epoch whose augmentation is applied, or -1 for none.
        split: Name of the stored split that the ids number.
        domain: ``"source"`` or ``"target"`` in a pair of domains, otherwise empty.
    """

    pixels: Tensor
    labels: Tensor
    ids: Tensor
    epoch: int
    split: str
    domain: str = ""
