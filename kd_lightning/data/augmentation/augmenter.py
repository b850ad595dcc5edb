"""The way of a batch on the device: gathered, cropped, normalized, mixed."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.data.augmentation.crops import Crops, draw_crops, gather_crops, normalize, pack, unpack
from kd_lightning.data.augmentation.mixing import mix
from kd_lightning.data.augmentation.settings import Augmentation
from kd_lightning.data.batch import Batch, RawBatch
from kd_lightning.data.image_set import ImageFiles, ImageSet


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
    """

    def __init__(
        self,
        splits: Mapping[str, ImageSet | ImageFiles],
        augmentation: Augmentation,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        view_seed: int,
        views: int | None,
    ) -> None:
        self.splits = splits
        self.padding = augmentation.padding or 0
        self.flip = bool(augmentation.flip)
        self.mixup = augmentation.mixup or 0.0
        self.cutmix = augmentation.cutmix or 0.0
        self.mean = mean
        self.std = std
        self.view_seed = view_seed
        self.views = views
        self.device_images: dict[tuple[str, torch.device], Tensor] = {}
        self.crop_cache: dict[str, tuple[tuple[int, torch.device], Crops]] = {}

    @property
    def mixes_images(self) -> bool:
        """Return whether mixup or CutMix blends training images and their labels."""
        return self.mixup > 0 or self.cutmix > 0

    def __call__(self, batch: RawBatch, *, num_classes: int = 0) -> Batch:
        """Return the augmented and normalized batch; mixed labels are ``num_classes`` wide."""
        images = normalize(self._integers(batch), mean=self.mean, std=self.std)
        ids = batch.ids
        if batch.epoch >= 0 and self.views is not None:
            ids = ids * self.views + self.view_of_epoch(batch.epoch)
        if batch.epoch < 0 or not self.mixes_images:
            return Batch(images, batch.labels, ids)
        probabilities = F.one_hot(batch.labels, num_classes).float()
        images, probabilities = mix(
            images,
            probabilities,
            batch.ids,
            seed=self.view_seed,
            epoch=batch.epoch,
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
        )
        return Batch(images, probabilities, ids)

    def pixels(self, batch: RawBatch) -> Tensor:
        """Return the images before normalization and mixing, uint8 ``(B, channels, H, W)``."""
        return self._integers(batch).to(torch.uint8)

    def clear(self) -> None:
        """Forget the images and crops of splits that are read again."""
        self.device_images.clear()
        self.crop_cache.clear()

    def view_of_epoch(self, epoch: int) -> int:
        """Return the view that an epoch shows, or -1 for images without augmentation."""
        return epoch if self.views is None or epoch < 0 else epoch % self.views

    def _integers(self, batch: RawBatch) -> Tensor:
        if batch.pixels.numel():
            packed = pack(batch.pixels, padding=self.padding)
            rows = torch.arange(len(batch.ids), device=batch.ids.device)
        else:
            packed, rows = self._images(batch.split, batch.ids.device), batch.ids
        crops = self._crops(batch.split, self.view_of_epoch(batch.epoch), batch.ids.device).select(batch.ids)
        return unpack(gather_crops(packed, rows, crops, padding=self.padding), channels=len(self.mean))

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
            drawn = draw_crops(samples, seed=self.view_seed, epoch=view, padding=self.padding, flip=self.flip)
            self.crop_cache[split] = (view, device), drawn
        return self.crop_cache[split][1]
