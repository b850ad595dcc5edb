"""What the data modules share: splits, loaders, and the augmentation of a batch on the device."""

import hashlib
import json
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from kd_lightning.data.augmentation.crops import Crops, cut, draw_crops, normalise, pack, unpack
from kd_lightning.data.augmentation.mixing import mix
from kd_lightning.data.batch import Batch, RawBatch
from kd_lightning.data.image_set import ImageSet, Part
from kd_lightning.data.loader import EpochLoader
from kd_lightning.data.sampler import EpochSampler
from kd_lightning.errors import UserError


class ImageDataModule(pl.LightningDataModule, ABC):
    """Batches of uint8 images, gathered, augmented and normalised as a batch on the device.

    The augmentation of a sample in an epoch depends on (``view_seed``, sample, epoch) alone. A subclass says where the
    images come from (:meth:`load`) and what they are (``classes``).

    Args:
        batch_size: Images of a batch, of one process.
        val_fraction: Share of each class that is split from the training images where there is no validation set.
        seed: Of the order of samples.
        view_seed: Of the augmentation.
        padding: Pixels of zeros on each side from which a random crop is cut; 0 for none.
        flip: Whether half of the training images are mirrored.
        mean: Of each channel of images in [0, 1].
        std: Standard deviation of each channel.
        mixup: alpha of mixup's Beta distribution; 0 for none.
        cutmix: alpha of CutMix's; with both, each image gets one of them.
        num_workers: Processes that read images; 0 is best for sets in memory.
        views: V, if the augmentation of an image goes round in V fixed views, epoch e showing view e mod V; ``None``
            for a new one in each epoch.
        split_seed: Of the split, where it is to stay as ``seed`` changes, as for several students of one teacher, which
            must not have learned what they are validated on; ``seed`` if ``None``.

    Raises:
        ValueError: If an argument lies outside its range.
    """

    size: tuple[int, int] | None = None
    """Height and width, where they are known before a set is read."""
    yields_pairs = False
    predict_split = "predict"
    """The images that ``predict`` shows: those of another split on request, without augmentation."""

    def __init__(
        self,
        batch_size: int,
        val_fraction: float,
        seed: int,
        view_seed: int,
        padding: int,
        flip: bool,
        mean: Sequence[float],
        std: Sequence[float],
        mixup: float,
        cutmix: float,
        num_workers: int,
        views: int | None = None,
        split_seed: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size must be >= 1, got {batch_size}.")
        if not 0 < val_fraction < 1:
            raise UserError(f"val_fraction must lie between 0 and 1, got {val_fraction}.")
        if min(padding, mixup, cutmix, num_workers) < 0:
            raise UserError("padding, mixup, cutmix and num_workers must be >= 0.")
        if views is not None and views < 1:
            raise UserError(f"views must be >= 1, or null for a new view in each epoch, got {views}.")
        if len(mean) != len(std) or not min(std) > 0:
            raise UserError(f"mean and std need one value for each channel, std above 0; got {mean} and {std}.")
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.split_seed = seed if split_seed is None else split_seed
        self.view_seed = view_seed
        self.padding = padding
        self.flip = flip
        self.mean = tuple(map(float, mean))
        self.std = tuple(map(float, std))
        self.mixup = mixup
        self.cutmix = cutmix
        self.num_workers = num_workers
        self.views = views
        self.splits: dict[str, ImageSet] = {}
        self._packed: dict[tuple[str, torch.device], Tensor] = {}
        self._drawn: dict[str, tuple[tuple[int, torch.device], Crops]] = {}
        # in-memory sets are augmented on the device: there is nothing for workers to do
        warnings.filterwarnings("ignore", ".*does not have many workers.*")

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the labels."""

    @abstractmethod
    def load(self, split: str) -> ImageSet | None:
        """Read ``"train"``, ``"val"``, ``"test"`` or ``"predict"``; ``None`` where there is no such set."""

    @property
    def mixes_images(self) -> bool:
        """Whether mixup or CutMix blends training images and their labels."""
        return bool(self.mixup or self.cutmix)

    @property
    def num_classes(self) -> int:
        """The number of classes, C."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        if self.size is not None:
            return len(self.mean), *self.size
        images = next(iter(self.splits.values()), None) or self._store("train")
        height, width = images.size if images.pixels is None and images.size else images.pixels.shape[2:]  # type: ignore[union-attr]
        return len(self.mean), height, width

    def image_name(self, split: str, sample: int) -> str:
        """The file of a sample of a split that is read, or its number."""
        split = self.predict_split if split == "predict" else split
        return self.splits[split if split in self.splits else "train"].name(sample)

    def setup(self, stage: str | None = None) -> None:
        """Read what a stage needs; the test images not before ``test``."""
        predicts = self.predict_split
        needs = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": (predicts,)}
        for split in needs[str(getattr(stage, "value", stage) or "fit")]:
            self._store(split)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of equal size."""
        return self._loader("train", self._train_samples, training=True)

    def val_dataloader(self) -> DataLoader:
        """The validation images, each once."""
        if self._store("val") is None:
            return self._loader("train", self._split[1])
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """The test images, each once."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        """The images to predict, in order."""
        if self.predict_split == "train":
            return self._loader("train", self._train_samples)
        return self.val_dataloader() if self.predict_split == "val" else self._loader(self.predict_split)

    def view_dataloader(self, view: int) -> DataLoader:
        """This rank's share of the training images, each once, in one of the fixed views."""
        images, samples = self._store("train"), self._train_samples
        assert images is not None
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        part = Part(images, samples, "train")
        places = [(position, view) for position in range(rank, len(samples), world)]
        return DataLoader(
            part,
            # no gradients are kept, so a batch of small images may be as large as is fast
            batch_size=max(self.batch_size, min(256, 2**20 // math.prod(self.image_shape))),
            sampler=places,  # as EpochSampler: (position, epoch)
            num_workers=self.num_workers,
            collate_fn=_as_fetched,  # type: ignore[arg-type]
        )

    def fingerprint(self) -> dict[str, str]:
        """What decides how the training images look in each view, to be compared with another run's."""
        images = self._store("train")
        assert images is not None
        digest = hashlib.sha256(self._train_samples.numpy().tobytes())
        if images.pixels is not None:
            digest.update(images.pixels.contiguous().numpy().data)
        else:
            seen = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in images.files]
            digest.update(json.dumps(seen).encode())
        return {
            "images": digest.hexdigest(),
            "statistics": f"mean {self.mean}, std {self.std}",
            "augmentation": f"{self.image_shape}, padding {self.padding}, flip {self.flip}",
            "view_seed": str(self.view_seed),
            "views": str(self.views),
        }

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Turn a :class:`RawBatch` into the :class:`Batch` that a module sees."""
        if not isinstance(batch, RawBatch):
            return batch
        # Lightning converts to the type of `bf16-true` or the like before this hook, when images are still bytes
        return self.trainer.precision_plugin.convert_input(self.view(batch))  # type: ignore[union-attr]

    def view(self, batch: RawBatch) -> Batch:
        """Gather, augment and normalise a batch on the device where it lies."""
        images = normalise(unpack(self._cut(batch), len(self.mean)), self.mean, self.std)
        ids = batch.ids
        if batch.epoch >= 0 and self.views is not None:
            ids = ids * self.views + self._shown(batch.epoch)
        if batch.epoch < 0 or not (self.mixup or self.cutmix):
            return Batch(images, batch.labels, ids)
        targets = F.one_hot(batch.labels, self.num_classes).float()
        mixed = mix(images, targets, batch.ids, self.view_seed, batch.epoch, self.mixup, self.cutmix)
        return Batch(*mixed, ids)

    def pixels(self, batch: RawBatch) -> Tensor:
        """The augmented images before they are normalised, uint8 ``(B, channels, H, W)``."""
        return unpack(self._cut(batch), len(self.mean)).to(torch.uint8)

    def _cut(self, batch: RawBatch) -> Tensor:
        if batch.pixels.numel():
            packed, rows = pack(batch.pixels, self.padding), torch.arange(len(batch.ids), device=batch.ids.device)
        else:
            packed, rows = self._resident(batch.store, batch.ids.device), batch.ids
        crops = self._crops(batch.store, self._shown(batch.epoch), batch.ids.device).of(batch.ids)
        return cut(packed, rows, crops, self.padding)

    def _shown(self, epoch: int) -> int:
        """The view of an epoch, or -1 for the image as it is."""
        return epoch if self.views is None or epoch < 0 else epoch % self.views

    def _crops(self, name: str, view: int, device: torch.device) -> Crops:
        """Of all samples at once, since a few numbers at a time cost as much as thousands."""
        if self._drawn.get(name, (None, None))[0] != (view, device):
            samples = torch.arange(len(self.splits[name].labels), device=device)
            self._drawn[name] = (view, device), draw_crops(self.view_seed, samples, view, self.padding, self.flip)
        return self._drawn[name][1]

    def _resident(self, name: str, device: torch.device) -> Tensor:
        if (name, device) not in self._packed:
            pixels = self.splits[name].pixels
            assert pixels is not None
            self._packed[name, device] = pack(pixels, self.padding).to(device)
        return self._packed[name, device]

    def _store(self, name: str) -> ImageSet | None:
        if name not in self.splits:
            images = self.load(name)
            if images is None and name != "val":
                raise UserError(f"{type(self).__name__} has no {name!r} images.")
            if images is None:
                self._store("train")
                return None
            labelled = images.labels[images.labels != -1]
            for label in map(int, labelled.aminmax() if len(labelled) else ()):
                if not 0 <= label < self.num_classes:
                    raise UserError(f"Label {label} of the {name!r} images is outside [0, {self.num_classes}).")
            self.splits[name] = images
        return self.splits[name]

    @cached_property
    def _split(self) -> tuple[Tensor, Tensor]:
        """Samples of the training images that are trained on, and that are validated on: a share of each class.

        Unlabelled ones are validated on where there are no others.
        """
        images = self._store("train")
        assert images is not None
        generator = torch.Generator().manual_seed(self.split_seed)
        unlabelled, val = bool((images.labels < 0).all()), []
        for label in images.labels.unique().tolist():
            members = (images.labels == label).nonzero().flatten()
            share = round(len(members) * self.val_fraction) if label >= 0 or unlabelled else 0
            val.append(members[torch.randperm(len(members), generator=generator)[:share]])
        chosen = torch.cat(val).sort().values
        left = torch.ones(len(images.labels), dtype=torch.bool)
        left[chosen] = False
        return left.nonzero().flatten(), chosen

    @property
    def _train_samples(self) -> Tensor:
        images = self._store("train")
        assert images is not None
        samples = torch.arange(len(images.labels)) if self._store("val") is not None else self._split[0]
        if (self.mixup or self.cutmix) and bool((images.labels[samples] < 0).any()):
            raise UserError("mixup and CutMix mix labels, but some images are unlabelled; set both to 0.")
        return samples

    def _loader(self, store: str, samples: Tensor | None = None, training: bool = False) -> DataLoader:
        images = self._store(store)
        assert images is not None
        samples = torch.arange(len(images.labels)) if samples is None else samples
        if not len(samples):
            raise UserError(
                f"No {'training' if training else 'validation'} image is left of {len(images.labels)} by "
                f"val_fraction={self.val_fraction} of each class; change it, or give more images."
            )
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        if len(samples) < world:
            raise UserError(f"{len(samples)} {store!r} images cannot be shared by {world} processes; use fewer.")
        batch_size = min(self.batch_size, len(samples) // world)
        part = Part(images, samples, store, epoch=0 if training else -1)
        loader = EpochLoader if training else DataLoader
        return loader(
            part,
            batch_size=batch_size,
            sampler=EpochSampler(part, batch_size, training, self.seed, world, rank),
            num_workers=self.num_workers,
            collate_fn=_as_fetched,  # type: ignore[arg-type]
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=self.num_workers > 0,
        )


def _as_fetched(batch: RawBatch) -> RawBatch:
    return batch
