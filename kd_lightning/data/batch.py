"""What our data modules yield."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """A batch of images.

    Attributes:
        images: Normalised floats ``(B, channels, H, W)``; uint8 or a placeholder before the transfer to the device.
        labels: Class indices ``(B,)``, -1 where unlabelled; class probabilities ``(B, C)`` under mixup and CutMix.
        ids: ``sample * V + view``, int64 ``(B,)``: samples numbered over the full stored set, V fixed views of each
            (1: the sample itself).
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
