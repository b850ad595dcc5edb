"""What our data modules yield, and what travels to the device before it."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """A batch of images, as modules see it.

    Attributes:
        images: Normalised floats ``(B, channels, H, W)``.
        labels: Class indices ``(B,)``, -1 where unlabelled; class probabilities ``(B, C)`` under mixup and CutMix.
        ids: ``sample * V + view``, int64 ``(B,)``: samples numbered over the full stored set, V fixed views of each
            (1: the sample itself).
    """

    images: Tensor
    labels: Tensor
    ids: Tensor


class RawBatch(NamedTuple):
    """A batch on its way to the device, where it becomes a :class:`Batch`.

    Attributes:
        pixels: uint8 ``(B, channels, H, W)`` of a set that is streamed, ``(B, 0)`` of one that lives on the device.
        labels: Class indices ``(B,)``.
        ids: int64 ``(B,)``.
        epoch: The epoch whose augmentation is shown, or -1 for the image as it is.
        store: The name of the stored set that the ids number.
    """

    pixels: Tensor
    labels: Tensor
    ids: Tensor
    epoch: int
    store: str
