"""The way of a batch on the device: gathered, cropped, recoloured, normalized, erased, mixed."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kd_lightning.data.augmentation.colours import apply_colours
from kd_lightning.data.augmentation.crops import (
    Crops,
    draw_crops,
    find_places,
    gather_crops,
    gather_places,
    normalize,
    pack,
    unpack,
)
from kd_lightning.data.augmentation.erasing import erase_
from kd_lightning.data.augmentation.mixing import mix_
from kd_lightning.data.augmentation.settings import Augmentation
from kd_lightning.data.augmentation.view_plan import ViewPlan
from kd_lightning.data.batch import Batch, RawBatch
from kd_lightning.data.image_set import ImageSet, StreamedImages


class Augmenter:
    """Turns each :class:`RawBatch` of a data module into a :class:`Batch`, on the device of the batch.

    It owns what all batches share: the images of each split, packed and copied to the device once, and the crops of
    all samples in the current view.

    Args:
        splits: The stored splits by name; splits may be added later.
        augmentation: Settings without ``None``.
        mean: Mean of each channel of images in [0, 1].
        std: Standard deviation of each channel.
        view_seed: Seed of the augmentation.
        views: Number of fixed views, or ``None`` for new views in each epoch.
        number: Place of this augmentation among those of a batch, from 0.
        views_in_batch: Number of views of each training image in a batch.
    """

    def __init__(
        self,
        splits: Mapping[str, ImageSet | StreamedImages],
        augmentation: Augmentation,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        view_seed: int,
        views: int | None,
        number: int = 0,
        views_in_batch: int = 1,
    ) -> None:
        self.splits = splits
        self.padding = augmentation.padding or 0
        self.flip = bool(augmentation.flip)
        self.vertical_flip = bool(augmentation.vertical_flip)
        self.mixes = bool(augmentation.mixup or augmentation.cutmix)
        self.mean = mean
        self.std = std
        self.view_seed = view_seed
        self.views = views
        self.number = number
        self.views_in_batch = views_in_batch
        self.device_images: dict[tuple[str, torch.device], Tensor] = {}
        self.crop_cache: dict[str, tuple[tuple[int, torch.device], Crops]] = {}

    def __call__(self, batch: RawBatch, *, num_classes: int) -> Batch:
        """Return the augmented and normalized batch; mixed labels are ``num_classes`` wide."""
        plan = batch.plan or ViewPlan(batch.ids)
        images = self._finish(self._integers(batch), plan)
        teacher_images = None
        if batch.teacher_pixels is not None:
            scale = batch.teacher_pixels.shape[2] / images.shape[2]
            teacher_images = self._finish(self._teacher_integers(batch, plan), plan, scale=scale)
        labels, ids = batch.labels, batch.view_ids
        if ids is None:
            ids = self._view_ids(batch.ids, batch.epoch)
        if self.mixes and batch.epoch >= 0 and labels.dim() == 1:  # of all batches alike, also where no row is labelled
            labels = _one_hot(labels, num_classes)
        if plan.mixing is not None and plan.partner_labels is not None:
            count, partners, own = len(ids), plan.partner_labels, labels
            images, labels = mix_(images[:count], images[count:], own, partners, plan.mixing)
            if teacher_images is not None:
                teacher_images, _ = mix_(teacher_images[:count], teacher_images[count:], own, partners, plan.mixing)
        return Batch(images, labels, ids, teacher_images)

    def place(self, split: str, samples: Tensor, labels: Tensor, *, epoch: int, device: torch.device) -> RawBatch:
        """Copy samples in the order of an epoch to a device, and find their pixels in the set that is kept there.

        Args:
            split: Name of a split in memory.
            samples: int64 ``(n,)``.
            labels: Their labels, ``(n,)``.
            epoch: Number of the epoch, -1 for no augmentation.
            device: Device on which the images are kept.

        Returns:
            All batches of the epoch as one; see :meth:`RawBatch.between`.
        """
        samples, labels = samples.to(device), labels.to(device)
        packed = self._images(split, device)
        view = self.view_of_epoch(epoch)
        places = find_places(packed, samples, self._crops(split, view, device).select(samples), view=view)
        pixels = samples.new_empty((len(samples), 0), dtype=torch.uint8)  # gathered batch by batch
        view_ids = self._view_ids(samples, epoch)
        return RawBatch(pixels, labels, samples, epoch, split, places=places, view_ids=view_ids)

    def pixels(self, batch: RawBatch) -> Tensor:
        """Return the images before normalization, erasing and mixing, uint8 ``(B, channels, H, W)``."""
        pixels = self._integers(batch).to(torch.uint8)
        if batch.plan is not None and batch.plan.colours is not None:
            pixels = apply_colours(pixels, batch.plan.colours)
        return pixels[: len(batch.ids)]

    def clear(self) -> None:
        """Forget the images and crops of splits that are read again."""
        self.device_images.clear()
        self.crop_cache.clear()

    def is_on(self, device: torch.device, split: str) -> bool:
        """Return whether the images of a split have been copied to a device."""
        return (split, device) in self.device_images

    def bytes_on_device(self, images: ImageSet) -> int:
        """Return the bytes that images take on a device, packed and padded."""
        height, width = (side + 2 * self.padding for side in images.size)
        return len(images) * height * width * 4

    def view_of_epoch(self, epoch: int) -> int:
        """Return the view that an epoch shows, or -1 for images without augmentation."""
        return epoch if self.views is None or epoch < 0 else epoch % self.views

    def _view_ids(self, samples: Tensor, epoch: int) -> Tensor:
        if epoch < 0:
            return samples
        ids = samples if self.views_in_batch == 1 else samples * self.views_in_batch + self.number
        return ids if self.views is None or self.views == 1 else ids * self.views + self.view_of_epoch(epoch)

    def _finish(self, pixels: Tensor, plan: ViewPlan, *, scale: float = 1.0) -> Tensor:
        """Return images that are recoloured, normalized and partly erased, at ``scale`` times the student's size."""
        if plan.colours is not None:
            pixels = apply_colours(pixels.to(torch.uint8), plan.colours, scale=scale)
        images = normalize(pixels, mean=self.mean, std=self.std)
        return images if plan.erasing is None else erase_(images, plan.erasing, scale=scale)

    def _integers(self, batch: RawBatch) -> Tensor:
        """Return the pixels of a batch and of its partners, with values from 0 to 255."""
        samples = batch.ids if batch.plan is None else batch.plan.samples
        view, places = self.view_of_epoch(batch.epoch), batch.places
        if places is not None and places.view == view and places.first.device == samples.device:
            packed = self._images(batch.split, samples.device)
            return unpack(gather_places(packed, places, padding=self.padding), channels=len(self.mean))
        if batch.pixels.numel():
            if self._is_cut(batch):
                return batch.pixels
            packed = pack(batch.pixels, padding=self.padding)
            rows = torch.arange(len(samples), device=samples.device)
        else:
            packed, rows = self._images(batch.split, samples.device), samples
        crops = self._crops(batch.split, view, samples.device).select(samples)
        return unpack(gather_crops(packed, rows, crops, padding=self.padding), channels=len(self.mean))

    def _teacher_integers(self, batch: RawBatch, plan: ViewPlan) -> Tensor:
        """Return the pixels for the teacher, mirrored as those for the student are on the device."""
        pixels = batch.teacher_pixels
        assert pixels is not None
        if self._is_cut(batch) or not (self.flip or self.vertical_flip):
            return pixels
        crops = self._crops(batch.split, self.view_of_epoch(batch.epoch), pixels.device).select(plan.samples)
        for bit, axis in ((1, 3), (2, 2)):
            mirrored = (crops.mirrored & bit)[:, None, None, None] > 0
            pixels = torch.where(mirrored, pixels.flip(axis), pixels)
        return pixels

    def _is_cut(self, batch: RawBatch) -> bool:
        """Return whether the images were cut and mirrored on the host, or are shown as they are."""
        images = self.splits[batch.split]
        return isinstance(images, StreamedImages) and (images.crop is not None or batch.epoch < 0)

    def _images(self, split: str, device: torch.device) -> Tensor:
        if (split, device) not in self.device_images:
            images = self.splits[split]
            if not isinstance(images, ImageSet):
                raise RuntimeError(f"The images of {split!r} are not in memory, but their batch has no pixels.")
            self.device_images[split, device] = pack(images.pixels, padding=self.padding).to(device)
        return self.device_images[split, device]

    def _crops(self, split: str, view: int, device: torch.device) -> Crops:
        """Return the crops of all samples, since drawing a few costs as much as drawing thousands."""
        if self.crop_cache.get(split, (None, None))[0] != (view, device):
            samples = torch.arange(len(self.splits[split].labels), device=device)
            drawn = draw_crops(
                samples,
                seed=self.view_seed,
                epoch=view,
                padding=self.padding,
                flip=self.flip,
                vertical_flip=self.vertical_flip,
            )
            self.crop_cache[split] = (view, device), drawn
        return self.crop_cache[split][1]


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Return class indices as probabilities ``(B, C)``, with rows of -1 where unlabelled."""
    labels = labels[:, None]
    return (labels == torch.arange(num_classes, device=labels.device)).float() - (labels < 0).float()
