"""A labelled source and an unlabelled target, for domain adaptation."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from kd_lightning.data.augmentation.affine import draw_affine, transform
from kd_lightning.data.augmentation.settings import Augmentation
from kd_lightning.data.batch import Batch, RawBatch
from kd_lightning.data.hyper_parameters import save_arguments
from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.precision import to_trainer_precision
from kd_lightning.data.protocol import LabelledSet
from kd_lightning.data.shapes import check_size, resize, statistics, with_channels
from kd_lightning.errors import UserError
from kd_lightning.files.images import UnreadableImageError
from kd_lightning.networks.data_config import truncate

_NO_SETTINGS = Augmentation()


class DomainPairDataModule(pl.LightningDataModule):
    """Two data modules at once: a labelled source, and a target, where the network will be used.

    Training batches are ``{"source": Batch, "target": Batch}`` with as many images of each; the target's labels are -1.
    An epoch is one pass over the source; the target is shown pass after pass, each shuffled, so that all its images
    are seen equally often. There are two validation loaders, the source's and the target's; ``test`` and ``predict``
    show the target's images. Labels of the target appear only in its validation and test batches.

    With ``concat`` the two are one batch, and only the source is validated on, for modules without domains: a student
    learns from a teacher on the images of both.

    Each domain is augmented and normalized by its own data module; then its images get the pair's size and channels,
    and training images are rotated and scaled.

    Args:
        source: The labelled data; its ``batch_size`` is that of training.
        target: The data without training labels; its ``batch_size`` is that of evaluation.
        size: Height and width of all images; ``None`` for those of the larger domain.
        augmentation: ``rotation`` and ``scaling`` of the training images of both domains; see :func:`draw_affine`.
        concat: Make a training batch one :class:`Batch`, the source's images followed by the target's.

    Raises:
        UserError: If an argument is outside its range, the classes or channels of the two do not fit together, or
            labels would be mixed that are not there.

    Example:
        >>> from kd_lightning.data import DigitsDataModule
        >>> pair = DomainPairDataModule(DigitsDataModule(batch_size=32), DigitsDataModule(), size=16)
        >>> batch, _, _ = next(iter(pair.train_dataloader()))
        >>> source, target = pair.augment(batch["source"]), pair.augment(batch["target"])
        >>> source.images.shape, target.labels.unique()
        (torch.Size([32, 1, 16, 16]), tensor([-1]))
    """

    views = None
    """Each domain may have fixed views; a batch of both has none that a cache could number."""
    views_in_batch = 1

    def __init__(
        self,
        source: ImageDataModule,
        target: ImageDataModule,
        *,
        size: int | None = None,
        augmentation: Augmentation = _NO_SETTINGS,
        concat: bool = False,
    ) -> None:
        check_size(size)
        self.augmentation = Augmentation.resolve(augmentation, _NO_SETTINGS)
        self.augmentation.check_unused(
            *(field.name for field in fields(Augmentation) if field.name not in ("preset", "rotation", "scaling")),
            by=type(self).__name__,
            instead="set it for the source or the target",
        )
        for part in (source, target):
            if part.teacher_shape is not None:
                raise UserError("DomainPairDataModule has one size for all networks; set teacher_size to null.")
            if part.second_view is not None:
                raise UserError("DomainPairDataModule has one view of each image in a batch; set second_view to null.")
        if target.mixes_images:
            raise UserError("mixup and CutMix mix labels, but the target has none; set both to 0 for the target.")
        if concat and source.mixes_images:
            raise UserError(
                "With concat a batch has class indices, which mixup and CutMix replace; set both to 0 for the source."
            )
        self.source = source
        self.target = target
        super().__init__()  # which sets the trainer of both
        source.domain, target.domain = "source", "target"
        self.size = size
        self.concat = concat
        save_arguments(
            self,
            source=dict(source.hparams),
            target=dict(target.hparams),
            size=size,
            augmentation=asdict(self.augmentation),
            concat=concat,
        )

    @property
    def trainer(self) -> pl.Trainer | None:
        """The trainer, which both domains use."""
        return self.source.trainer

    @trainer.setter
    def trainer(self, trainer: pl.Trainer | None) -> None:
        self.source.trainer = self.target.trainer = trainer

    # --- the images, see ImageData

    @property
    def yields_pairs(self) -> bool:
        """Return whether a training batch keeps the domains apart."""
        return not self.concat

    @property
    def mixes_images(self) -> bool:
        """Return whether mixup or CutMix blends the source's training images."""
        return self.source.mixes_images

    @property
    def batch_size(self) -> int:
        """Images of each domain in a training batch of one process."""
        return self.source.batch_size

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the labels."""
        return self.source.classes

    @property
    def multi_label(self) -> bool:
        """Return ``False``: images have one class, which ``setup`` checks."""
        return False

    @property
    def num_classes(self) -> int:
        """The number of classes, C."""
        return self.source.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of all images."""
        if self.size is not None:
            return self._channels, self.size, self.size
        (_, *source), (_, *target) = self.source.image_shape, self.target.image_shape
        return self._channels, max(source[0], target[0]), max(source[1], target[1])

    @property
    def splits(self) -> dict[str, LabelledSet]:
        """The splits of both domains that were read, by ``"domain/split"``."""
        return {
            f"{part.domain}/{split}": images
            for part in (self.source, self.target)
            for split, images in part.splits.items()
        }

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean of each channel of the target's images."""
        return statistics(self.target.mean, channels=self._channels)

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation of each channel of the target's images."""
        return statistics(self.target.std, channels=self._channels)

    @property
    def predict_split(self) -> str:
        """The split of the target that ``predict`` shows."""
        return self.target.predict_split

    @predict_split.setter
    def predict_split(self, split: str) -> None:
        self.target.predict_split = split

    @property
    def left_out(self) -> Sequence[UnreadableImageError]:
        """Images to predict that were found to be broken before the first batch."""
        return self.target.left_out

    def has_labels(self, split: str) -> bool:
        """Return whether an image of a split of the source is labelled."""
        return self.source.has_labels(split)

    @property
    def all_labelled(self) -> bool:
        """Return whether every image of the source is labelled and batches keep it apart: the target's are hidden."""
        return self.source.all_labelled and not self.concat

    def image_name(self, split: str, sample: int) -> str:
        """Return the file of a sample of the target, or its number."""
        return self.target.image_name(split, sample)

    def faster_reading(self) -> list[str]:
        """Return imperatives with the settings of both domains that shorten the waits for images."""
        return [*self.source.faster_reading(), *self.target.faster_reading()]

    # --- hooks, in the order in which Lightning calls them

    def prepare_data(self) -> None:
        """Download the data of both domains."""
        self.source.prepare_data()
        self.target.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Check that the domains fit together and read what a stage needs: the source only to train and validate."""
        for part in (self.source, self.target):
            if part.multi_label:
                raise UserError(
                    f"DomainPairDataModule takes images of one class, but the {part.domain} has images of several; "
                    "train on it alone."
                )
        source, target = self.source.classes, self.target.classes
        if target and source != target:
            raise UserError(
                f"The source has {len(source)} classes ({truncate(source)}) and the target {len(target)} "
                f"({truncate(target)}); give both the same names in the same order."
            )
        channels = len(self.source.mean), len(self.target.mean)
        if channels[0] != channels[1] and sorted(channels) != [1, 3]:
            raise UserError(
                f"The source's images have {channels[0]} channels and the target's {channels[1]}; only grey images can "
                "get more channels."
            )
        self.target.setup(stage)
        if str(getattr(stage, "value", stage) or "fit") in ("fit", "validate"):
            self.source.setup(stage)

    def train_dataloader(self) -> CombinedLoader:
        """Return shuffled batches of both domains, of one size; the target's labels are hidden."""
        source = self.source.train_dataloader()
        target = self.target.unlabelled_dataloader(batch_size=source.batch_size or 1, steps=len(source))
        return CombinedLoader({"source": source, "target": target}, "min_size")

    def val_dataloader(self) -> DataLoader[RawBatch] | list[DataLoader[RawBatch]]:
        """Return the validation images of the source, then (unless ``concat``) of the target, each once."""
        source = self.source.val_dataloader()
        return source if self.concat else [source, self.target.val_dataloader()]

    def test_dataloader(self) -> DataLoader[RawBatch]:
        """Return the target's test images, each once."""
        return self.target.test_dataloader()

    def predict_dataloader(self) -> DataLoader[RawBatch]:
        """Return the target's images to predict, in order."""
        return self.target.predict_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Turn each :class:`RawBatch` into the :class:`Batch` that a module sees."""
        if isinstance(batch, dict):
            both = {domain: self.on_after_batch_transfer(part) for domain, part in batch.items()}
            return _joined(both["source"], both["target"]) if self.concat else both
        if not isinstance(batch, RawBatch):
            return batch
        return to_trainer_precision(self.augment(batch), self.trainer)

    def augment(self, batch: RawBatch) -> Batch:
        """Gather, augment, normalize and resize a batch of one of the domains on its device."""
        part = self.source if batch.domain == "source" else self.target
        augmented = part.augment(batch)
        channels, *size = self.image_shape
        images = resize(augmented.images, size=(size[0], size[1]))
        rotation, scaling = self.augmentation.rotation or 0.0, self.augmentation.scaling or 0.0
        if batch.epoch >= 0 and (rotation or scaling):
            matrices = draw_affine(
                batch.ids, seed=part.view_seed, epoch=batch.epoch, rotation=rotation, scaling=scaling
            )
            black = [-mean / std for mean, std in zip(part.mean, part.std, strict=True)]
            images = transform(images, matrices, background=black)
        return augmented._replace(images=with_channels(images, channels=channels))

    # --- hooks that both domains get

    def teardown(self, stage: str) -> None:
        """Tear down both domains."""
        self.source.teardown(stage)
        self.target.teardown(stage)

    def on_exception(self, exception: BaseException) -> None:
        """Pass an exception to both domains."""
        self.source.on_exception(exception)
        self.target.on_exception(exception)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both domains."""
        return {"source": self.source.state_dict(), "target": self.target.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the states of both domains."""
        self.source.load_state_dict(state_dict["source"])
        self.target.load_state_dict(state_dict["target"])

    @property
    def _channels(self) -> int:
        return max(len(self.source.mean), len(self.target.mean))


def _joined(source: Batch, target: Batch) -> Batch:
    """Return one batch of the images of both domains."""
    images, labels, ids = (torch.cat([first, second]) for first, second in zip(source[:3], target[:3], strict=True))
    return Batch(images, labels, ids)
