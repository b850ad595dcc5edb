"""Batches before and after they are augmented on the device."""

from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor

from kd_lightning.data.augmentation.crops import Places
from kd_lightning.data.augmentation.view_plan import ViewPlan


class Batch(NamedTuple):
    """A batch of images, as modules see it.

    Attributes:
        images: Normalized floats ``(B, channels, H, W)``.
        labels: Class indices ``(B,)``, -1 where unlabelled; class probabilities ``(B, C)`` under mixup and CutMix, with
            rows of -1 where unlabelled. Of multi-label data 1 for each class of an image and 0 for the others,
            ``(B, C)``, or fractions of the two, with rows of -1 where unlabelled.
        ids: ``sample * V + view``, int64 ``(B,)``, with samples numbered over the full stored set and V fixed views of
            each (1: the sample itself). With two views of each sample in a batch it has twice as many rows, first all
            of one and then all of the other, and V counts both: the second views are the latter half of V.
        teacher_images: The same views at the size of the teacher, ``None`` where that is the size of ``images``.

    Example:
        >>> import torch
        >>> batch = Batch(torch.zeros(2, 3, 8, 8), labels=torch.tensor([1, -1]), ids=torch.arange(2))
        >>> images, labels, *_ = batch
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    teacher_images: Tensor | None = None


class LoadedBatch(NamedTuple):
    """A batch of any loader, as modules see it.

    Attributes:
        images: Normalized floats ``(B, channels, H, W)``.
        labels: Class indices, int64 ``(B,)``, -1 where unlabelled; or class probabilities ``(B, C)``; of multi-label
            data as in :class:`Batch`.
        ids: Integers ``(B,)``; see :class:`Batch`. ``None`` where the loader gives none.
        teacher_images: See :class:`Batch`.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor | None
    teacher_images: Tensor | None = None


def images_for_teacher(batch: Batch | LoadedBatch) -> Tensor:
    """Return the images of a batch at the size of the teacher, ``(B, channels, H, W)``."""
    return batch.images if batch.teacher_images is None else batch.teacher_images


class RawBatch(NamedTuple):
    """A batch on its way to the device, where it becomes a :class:`Batch`.

    Attributes:
        pixels: uint8 ``(R, channels, H, W)`` of images that are read or cut on the host, where R = B without a plan;
            ``(R, 0)`` of a set that is kept on the device.
        labels: Class indices ``(B,)``, or of multi-label data ``(B, C)``.
        ids: int64 ``(B,)``, samples numbered over the stored set.
        epoch: Epoch whose augmentation is applied, or -1 for none.
        split: Name of the stored split that the ids number.
        domain: ``"source"`` or ``"target"`` in a pair of domains, otherwise empty.
        plan: Changes to the images beside crops and flips, ``None`` if there are none.
        teacher_pixels: The same views as ``pixels`` at the size of the teacher, if that differs.
        places: Places of the images in a set that is kept on the device, if they were found for the whole epoch.
        view_ids: The ids of the :class:`Batch`, if they were computed for the whole epoch.
        second: The same samples with the plan of their second view, if a batch has two of each.
    """

    pixels: Tensor
    labels: Tensor
    ids: Tensor
    epoch: int
    split: str
    domain: str = ""
    plan: ViewPlan | None = None
    teacher_pixels: Tensor | None = None
    places: Places | None = None
    view_ids: Tensor | None = None
    second: "RawBatch | None" = None

    def between(self, start: int, stop: int) -> "RawBatch":
        """Return neighbouring images of a set that is kept on the device; nothing is copied."""
        assert self.places is not None
        assert self.view_ids is not None
        tensors = self.pixels, self.labels, self.ids, self.view_ids
        pixels, labels, ids, view_ids = (values[start:stop] for values in tensors)
        places = self.places.between(start, stop)
        return self._replace(pixels=pixels, labels=labels, ids=ids, places=places, view_ids=view_ids)

    @property
    def is_independent_of_epoch(self) -> bool:
        """Return whether tensors alone say what the batch shows, so that a captured step can make it."""
        return self.places is not None and self.plan is None and self.teacher_pixels is None and self.epoch >= 0

    def without_epoch(self, view: int) -> "RawBatch":
        """Return the same images as those of epoch 0, whose view is ``view``.

        Its epoch is not a tensor, so that a captured step would make the batches of one epoch only.
        """
        assert self.places is not None
        return self._replace(epoch=0, places=self.places._replace(view=view))


class _Finishing(Protocol):
    def finish(self, batch: RawBatch) -> Batch: ...


def finished(batch: Any, data: object) -> Any:
    """Return a batch as modules see it, also one that a data module has left to the step to augment."""
    return cast("_Finishing", data).finish(batch) if isinstance(batch, RawBatch) else batch
