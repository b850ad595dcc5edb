"""The base of the data modules: splits, loaders, and the augmentation of a batch on the device."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from kd_lightning.data.augmentation.augmenter import Augmenter
from kd_lightning.data.augmentation.colours import DIFFER_BETWEEN_DEVICES, check_channels
from kd_lightning.data.augmentation.resized_crop import ResizedCrop
from kd_lightning.data.augmentation.settings import Augmentation
from kd_lightning.data.augmentation.two_views import SecondView, check_two_views, join_views, second_crop, second_seed
from kd_lightning.data.augmentation.view_plan import ViewDrawer
from kd_lightning.data.batch import Batch, RawBatch
from kd_lightning.data.hyper_parameters import save_arguments
from kd_lightning.data.image_set import ImageSet, StreamedImages, Subset
from kd_lightning.data.labels import check_labels, is_labelled
from kd_lightning.data.loader import EpochLoader, ImageLoader, as_fetched, more_workers
from kd_lightning.data.precision import to_trainer_precision
from kd_lightning.data.sampler import EpochSampler
from kd_lightning.data.shapes import stored_with_channels
from kd_lightning.data.splits import StoredSplits
from kd_lightning.data.storage_place import fits_on_device
from kd_lightning.errors import UserError
from kd_lightning.files.images import UnreadableImageError
from kd_lightning.files.prepare import Preparation

_NO_SETTINGS = Augmentation()
_STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}


class ImageDataModule(pl.LightningDataModule, ABC):
    """Batches of uint8 images, gathered, augmented and normalized as a batch on the device.

    The augmentation of a sample in an epoch depends only on (``view_seed``, sample, epoch). A subclass reads the
    images (:meth:`load`) and names their ``classes``; it passes its own defaults and ``**options`` to this constructor.

    Args:
        mean: Mean of each channel of images in [0, 1].
        std: Standard deviation of each channel.
        augmentation: Random changes to training images; what is not set is taken from its ``preset``, or else from the
            ``default_augmentation`` of the data module.
        batch_size: Images in a batch of one process.
        val_fraction: Fraction of each class that is split from the training images if there is no validation set.
        seed: Seed of the order of samples.
        view_seed: Seed of the augmentation.
        num_workers: Processes that read images; 0 is best for sets in memory.
        views: Number V of fixed views of each image, where epoch e shows view e mod V; ``None`` for a new view in each
            epoch.
        balanced_sampling: Show the classes equally often in an epoch, which has as many images as without this: those
            of rare classes several times, in one view an epoch. Not for images of several classes.
        second_view: Augmentation of a second view of each training image, for losses that compare a weak and a strong
            one: a batch then has twice as many rows, first all of ``augmentation`` and then all of this. What is not
            set is taken as for ``augmentation``. Not with mixup or CutMix, and with random resized crops in both or in
            neither. ``None`` for one view.
        split_seed: Seed of the split, if it stays the same while ``seed`` changes, as for several students of one
            teacher, which must not have been trained on their validation images; ``seed`` if ``None``.
        labels_per_class: Number of training images of each class that keep their label, chosen by ``seed``, as where
            labels are expensive; the others count as unlabelled. ``None`` for all. Validation and test images keep
            theirs.
        labelled_only: Train only on images with a label, in place of all.

    Raises:
        UserError: If an argument is outside its range.

    Example:
        >>> from kd_lightning import DigitsDataModule
        >>> data = DigitsDataModule(batch_size=32)
        >>> data.setup("fit")
        >>> batch = data.augment(next(iter(data.train_dataloader())))
        >>> batch.images.shape, batch.labels.shape
        (torch.Size([32, 1, 8, 8]), torch.Size([32]))
    """

    default_augmentation = Augmentation()
    """Settings below an explicit preset and explicit fields."""
    size: tuple[int, int] | None = None
    """Height and width, if they are known before a split is read."""
    domain = ""
    """Role in a :class:`~kd_lightning.data.domain_pair.DomainPairDataModule`, which sets it."""
    predict_split = "predict"
    """The split that ``predict`` shows, without augmentation."""
    yields_pairs = False
    left_out: Sequence[UnreadableImageError] = ()
    """Images to predict that were found to be broken before the first batch."""

    def __init__(
        self,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation = _NO_SETTINGS,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        view_seed: int = 0,
        num_workers: int = 0,
        views: int | None = None,
        balanced_sampling: bool = False,
        second_view: Augmentation | None = None,
        split_seed: int | None = None,
        labels_per_class: int | None = None,
        labelled_only: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size must be >= 1, got {batch_size}.")
        if not 0 < val_fraction < 1:
            raise UserError(f"val_fraction must be between 0 and 1, got {val_fraction}.")
        if num_workers < 0:
            raise UserError(f"num_workers must be >= 0, got {num_workers}.")
        if views is not None and views < 1:
            raise UserError(f"views must be >= 1, or null for a new view in each epoch, got {views}.")
        if labels_per_class is not None and labels_per_class < 1:
            raise UserError(f"labels_per_class must be >= 1, or null for all labels, got {labels_per_class}.")
        if len(mean) != len(std) or not min(std) > 0:
            raise UserError(f"mean and std need one value for each channel, std above 0; got {mean} and {std}.")
        self.augmentation = Augmentation.resolve(augmentation, self.default_augmentation)
        self.augmentation.check_unused(
            "rotation", "scaling", by=type(self).__name__, instead="set it in a DomainPairDataModule"
        )
        check_channels(augmentation, self.augmentation, len(mean))
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.split_seed = seed if split_seed is None else split_seed
        self.view_seed = view_seed
        self.mean = tuple(map(float, mean))
        self.std = tuple(map(float, std))
        self.num_workers = num_workers
        self.views = views
        self.augments_in_step = False
        """Whether training batches are handed on as they are, since a CUDA graph of the step augments them."""
        self.balanced_sampling = balanced_sampling
        self.splits = StoredSplits(
            self._load_checked,
            val_fraction=val_fraction,
            seed=self.split_seed,
            labels_per_class=labels_per_class,
            labels_seed=seed,
            labelled_only=labelled_only,
        )
        self.second_view = None
        if second_view is not None:
            self.second_view = Augmentation.resolve(second_view, self.default_augmentation)
            check_two_views(self.augmentation, self.second_view)
            check_channels(second_view, self.second_view, len(mean))
        self.augmenters = self._augmenters()
        save_arguments(
            self,
            mean=self.mean,
            std=self.std,
            augmentation=asdict(self.augmentation),
            batch_size=batch_size,
            val_fraction=val_fraction,
            seed=seed,
            view_seed=view_seed,
            num_workers=num_workers,
            views=views,
            balanced_sampling=balanced_sampling,
            second_view=self.second_view and asdict(self.second_view),
            split_seed=split_seed,
            labels_per_class=labels_per_class,
            labelled_only=labelled_only,
        )

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the labels."""

    @abstractmethod
    def load(self, split: str) -> ImageSet | StreamedImages | None:
        """Read ``"train"``, ``"val"``, ``"test"`` or ``"predict"``; return ``None`` if there is no such split."""

    @property
    def num_classes(self) -> int:
        """The number of classes, C."""
        return len(self.classes)

    @property
    def multi_label(self) -> bool:
        """Return whether an image may have several classes: labels are then 1 for each of them and 0 for the others."""
        return False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        if self.size is not None:
            return len(self.mean), *self.size
        images = next(iter(self.splits.values()), None) or self.splits.read("train")
        return len(self.mean), *images.size

    @property
    def preparation(self) -> Preparation | None:
        """The preparation of images for evaluation, if they are resized or cropped."""
        return None

    @property
    def teacher_shape(self) -> tuple[int, int, int] | None:
        """Channels, height and width of the images for the teacher, ``None`` where all networks see the same size."""
        return None

    @property
    def augmenter(self) -> Augmenter:
        """The augmenter of the first view of a batch."""
        return self.augmenters[0]

    @property
    def views_in_batch(self) -> int:
        """The number of views of each image in a training batch."""
        return 1 if self.second_view is None else 2

    @property
    def mixes_images(self) -> bool:
        """Return whether mixup or CutMix blends training images and their labels."""
        return bool(self.augmentation.mixup or self.augmentation.cutmix)

    def has_labels(self, split: str) -> bool:
        """Return whether an image of ``"train"`` or ``"val"`` is labelled, or there is none at all."""
        if split == "val" and not self.splits.has_val:
            labels = self.splits.read("train").labels[self.splits.val_samples]
        else:
            labels = self.splits.read(split).labels
        return not len(labels) or bool(is_labelled(labels).any())

    @property
    def all_labelled(self) -> bool:
        """Return whether every training image is labelled."""
        return bool(is_labelled(self.splits.read("train").labels[self.train_samples]).all())

    def image_name(self, split: str, sample: int) -> str:
        """Return the file of a sample of a split that was read, or its number."""
        split = self.predict_split if split == "predict" else split
        return self.splits[split if split in self.splits else "train"].name(sample)

    def faster_reading(self) -> list[str]:
        """Return imperatives with the settings that shorten the time in which training waits for images."""
        if isinstance(self.splits["train"], ImageSet):  # gathered on the device
            return []
        processes = self.trainer.num_devices if self.trainer else 1
        return more_workers(self.setting("num_workers"), self.num_workers, processes)

    def setting(self, name: str) -> str:
        """Return the name under which a configuration sets an argument of this data module."""
        return f"data.{self.domain}.{name}" if self.domain else f"data.{name}"

    # --- what a stage shows, in the order in which Lightning calls it

    def setup(self, stage: str | None = None) -> None:
        """Read the splits that a stage needs; the test images not before ``test``."""
        name = str(getattr(stage, "value", stage) or "fit")
        if self.balanced_sampling and name == "fit" and self.multi_label:
            raise UserError(
                f"{self.setting('balanced_sampling')} shows each class equally often, which images of several classes "
                "cannot; set it to false, and model.class_weights to balanced."
            )
        for split in _STAGES.get(name, (self.predict_split,)):
            self.splits.read(split if split != "val" or self.splits.has_val else "train")

    def train_dataloader(self) -> DataLoader[RawBatch]:
        """Return shuffled batches of equal size."""
        return self._loader(self._subset("train", self.train_samples, epoch=0), balanced=self.balanced_sampling)

    def plain_train_dataloader(self) -> DataLoader[RawBatch]:
        """Return shuffled training batches without augmentation, prepared as for evaluation."""
        subset = self._subset("train", self.train_samples, epoch=0)
        subset.plain = True
        return self._loader(subset)

    def unlabelled_dataloader(self, *, batch_size: int, steps: int) -> DataLoader[RawBatch]:
        """Return shuffled training batches whose labels are -1.

        Args:
            batch_size: Images in a batch of one process.
            steps: Batches in an epoch; the next epoch continues with the images that follow.
        """
        if self.balanced_sampling:
            raise UserError(
                f"{self.setting('balanced_sampling')} needs labels, and those of these images are not read; set it to "
                "false."
            )
        subset = self._subset("train", self.train_samples, epoch=0)
        subset.labels = torch.full_like(subset.labels, -1)
        return self._loader(subset, batch_size=batch_size, steps=steps)

    def val_dataloader(self) -> DataLoader[RawBatch]:
        """Return the validation images, each once."""
        if self.splits.has_val:
            return self._loader(self._subset("val"))
        return self._loader(self._subset("train", self.splits.val_samples))

    def test_dataloader(self) -> DataLoader[RawBatch]:
        """Return the test images, each once."""
        return self._loader(self._subset("test"))

    def predict_dataloader(self) -> DataLoader[RawBatch]:
        """Return the images to predict, in order."""
        if self.predict_split == "val":
            return self.val_dataloader()
        return self._loader(
            self._subset(self.predict_split, self.train_samples if self.predict_split == "train" else None)
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch as Lightning does, unless it is there."""
        if isinstance(batch, RawBatch) and batch.places is not None and batch.ids.device == device:
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Turn a :class:`RawBatch` into the :class:`Batch` that a module sees, unless the module itself does it."""
        if self.augments_in_step and isinstance(batch, RawBatch) and batch.is_independent_of_epoch:
            return batch.without_epoch(self.augmenter.view_of_epoch(0))
        return self.finish(batch)

    def finish(self, batch: Any) -> Any:
        """Return a :class:`RawBatch` as a module sees it; other batches as they are."""
        if not isinstance(batch, RawBatch):
            return batch
        return to_trainer_precision(self.augment(batch), self.trainer)

    def augment(self, batch: RawBatch) -> Batch:
        """Gather, augment and normalize a batch on its device, in two views if it has a plan for a second one."""
        first = self.augmenter(batch, num_classes=self.num_classes)
        if batch.second is None:
            return first
        return join_views(first, self.augmenters[1](batch.second, num_classes=self.num_classes))

    def pixels(self, batch: RawBatch) -> Tensor:
        """Return the augmented images before they are normalized, erased and mixed, uint8 ``(B, channels, H, W)``."""
        return self.augmenter.pixels(batch)

    # --- fixed views, of which a teacher's outputs can be cached

    def view_dataloader(self, view: int) -> DataLoader[RawBatch]:
        """Return this rank's part of the training images, each once, in one of the fixed views."""
        images = self._for_device(self.splits.read("train"), "train")
        subset = Subset(images, self.train_samples, split="train", draw=self._draw, second_view=self._second)
        world_size, rank = self._ranks
        # no gradients are kept, so a batch of small images may be as large as is fast
        batch_size = max(self.batch_size, min(256, 2**20 // math.prod(self.image_shape)))
        indices = [(position, view) for position in range(rank, len(subset), world_size)]  # as of EpochSampler
        return ImageLoader(
            subset, batch_size=batch_size, sampler=indices, num_workers=self.num_workers, collate_fn=as_fetched
        )

    def fingerprint(self) -> dict[str, str]:
        """Return what determines the training images of each view, to compare with another run."""
        digest = hashlib.sha256(self.train_samples.numpy().tobytes())
        digest.update(self.splits.read("train").content())
        if self.mixes_images:
            digest.update(self._draw.candidates.numpy().tobytes())
        settings = {name: value for name, value in asdict(self.augmentation).items() if value and name != "preset"}
        found = {
            "images": digest.hexdigest(),
            "statistics": f"mean {self.mean}, std {self.std}",
            "augmentation": f"{self.image_shape}, {settings}",
            "view_seed": str(self.view_seed),
            "views": str(self.views),
        }
        if self.second_view is not None:
            found["second_view"] = str({name: value for name, value in asdict(self.second_view).items() if value})
        if any(getattr(a, name) for name in DIFFER_BETWEEN_DEVICES for a in (self.augmentation, self.second_view) if a):
            found["device"] = self.trainer.strategy.root_device.type if self.trainer else "cpu"
        return found

    @property
    def train_samples(self) -> Tensor:
        """The samples of the stored training images that are trained on."""
        return self.splits.train_samples

    def _load_checked(self, split: str) -> ImageSet | StreamedImages | None:
        images = self.load(split)
        if isinstance(images, ImageSet) and images.pixels.dim() == 4:
            images = replace(images, pixels=stored_with_channels(images.pixels, channels=len(self.mean)))
        if images is not None and bool((images.labels != -1).any()):
            check_labels(images.labels, num_classes=self.num_classes, split=split, multi_label=self.multi_label)
        if split != "train" or not self.augmentation.resized_crop or images is None:
            return images
        if isinstance(images, StreamedImages):
            return images if images.crop else replace(images, crop=self._resized_crop(images.size), plain=images.images)
        return StreamedImages(images, images.size, crop=self._resized_crop(images.size), plain=images)

    def _resized_crop(
        self,
        size: tuple[int, int],
        *,
        interpolation: str = "bilinear",
        teacher_size: tuple[int, int] | None = None,
        teacher_interpolation: str = "bilinear",
    ) -> ResizedCrop:
        """Return what cuts random boxes out of training images, at a size and at that of a teacher."""
        settings = self.augmentation
        assert settings.crop_scale is not None
        assert settings.crop_ratio is not None
        return ResizedCrop(
            size,
            scale=settings.crop_scale,
            ratio=settings.crop_ratio,
            flip=bool(settings.flip),
            vertical_flip=bool(settings.vertical_flip),
            interpolation=interpolation,
            teacher_size=teacher_size,
            teacher_interpolation=teacher_interpolation,
            seed=self.view_seed,
        )

    @property
    def _draw(self) -> ViewDrawer:
        """The function that draws the changes to training images beside crops and flips."""
        images, candidates = self.splits.read("train"), torch.empty(0, dtype=torch.int64)
        if self.mixes_images:
            samples = self.train_samples
            candidates = samples[is_labelled(images.labels[samples])]
            if not len(candidates):
                raise UserError("mixup and CutMix mix labels, but no training image is labelled; set both to 0.")
        return ViewDrawer(self.augmentation, images.size, self.view_seed, self.views, images.labels, candidates)

    @property
    def _second(self) -> SecondView | None:
        """The second view of training images, if a batch has two."""
        if self.second_view is None:
            return None
        images, seed, none = self.splits.read("train"), second_seed(self.view_seed), torch.empty(0, dtype=torch.int64)
        draw = ViewDrawer(self.second_view, images.size, seed, self.views, images.labels, candidates=none)
        crop = images.crop if isinstance(images, StreamedImages) else None
        return SecondView(draw, crop and second_crop(crop, self.second_view, seed))

    def _augmenters(self) -> list[Augmenter]:
        """Return an augmenter for each view of a batch; images that are padded alike are kept on the device once."""
        settings = [self.augmentation, *([] if self.second_view is None else [self.second_view])]
        made = [
            Augmenter(
                self.splits,
                augmentation,
                mean=self.mean,
                std=self.std,
                view_seed=second_seed(self.view_seed) if number else self.view_seed,
                views=self.views,
                number=number,
                views_in_batch=len(settings),
            )
            for number, augmentation in enumerate(settings)
        ]
        if made[-1].padding == made[0].padding:
            made[-1].device_images = made[0].device_images
        return made

    def _for_device(self, images: ImageSet | StreamedImages, split: str) -> ImageSet | StreamedImages:
        """Return images whose batches are copied to a GPU one by one, if all together would take too much of it."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if not isinstance(images, ImageSet) or device.type != "cuda" or self.augmenter.is_on(device, split):
            return images
        free, _ = torch.cuda.mem_get_info(device)
        if fits_on_device(self.augmenter.bytes_on_device(images), free):
            return images
        rank_zero_info(
            f"Data: the {split} images stay in memory, since they would take more than a quarter of the GPU's."
        )
        return StreamedImages(images, images.size)

    @property
    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _subset(self, split: str, samples: Tensor | None = None, *, epoch: int = -1) -> Subset:
        images, (world_size, _) = self.splits.read(split), self._ranks
        samples = torch.arange(len(images.labels)) if samples is None else samples
        if not len(samples):
            raise UserError(
                f"No {'validation' if epoch < 0 else 'training'} image is left of {len(images.labels)} by "
                f"val_fraction={self.val_fraction} of each class; change it, or provide more images."
            )
        if len(samples) < world_size:
            raise UserError(f"{len(samples)} {split!r} images are too few for {world_size} processes; use fewer.")
        draw, shown = self._draw if epoch >= 0 else None, self._for_device(images, split)
        second = self._second if epoch >= 0 else None
        subset = Subset(shown, samples, split=split, epoch=epoch, domain=self.domain, draw=draw, second_view=second)
        if isinstance(shown, ImageSet) and draw is not None and draw.draws_nothing and second is None:
            subset.place = partial(self._place_on_device, split)
        return subset

    def _place_on_device(self, split: str, samples: Tensor, labels: Tensor, epoch: int) -> RawBatch:
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        placed = self.augmenter.place(split, samples, labels, epoch=epoch, device=device)
        return placed._replace(domain=self.domain)

    def _loader(
        self, subset: Subset, *, batch_size: int = 0, steps: int | None = None, balanced: bool = False
    ) -> DataLoader[RawBatch]:
        world_size, rank = self._ranks
        batch_size = batch_size or min(self.batch_size, len(subset) // world_size)
        training = subset.epoch >= 0
        sampler = EpochSampler(
            subset,
            batch_size=batch_size,
            training=training,
            seed=self.seed,
            num_replicas=world_size,
            rank=rank,
            steps=steps,
            balanced=subset.labels[subset.samples] if balanced else None,
        )
        return (EpochLoader if training else ImageLoader)(
            subset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=as_fetched,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=self.num_workers > 0,
        )
