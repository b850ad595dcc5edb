"""A labelled source and an unlabelled target, for domain adaptation."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from kd_lightning.data.augmentation.affine import draw_affine, transform
from kd_lightning.data.batch import Batch, RawBatch
from kd_lightning.data.image_set import ImageSet, Part
from kd_lightning.data.loader import EpochLoader
from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.sampler import EpochSampler
from kd_lightning.data.shapes import check_size, resize, statistics, with_channels
from kd_lightning.errors import UserError


class DomainPairDataModule(pl.LightningDataModule):
    """Two data modules at once: a source, whose labels are trained on, and a target, where the network will be used.

    Training batches are ``{"source": Batch, "target": Batch}``, as many images of each; the target's labels are -1.
    An epoch is the source's; the target goes through its images pass after pass, each shuffled, so that all are seen
    equally often. There are two validation loaders, the source's and the target's; ``test`` and ``predict`` show the
    target's images. Labels of the target are in its validation and test batches alone.

    With ``joined`` the two are one batch and the source's validation images the only ones, for modules that know of no
    domains: a student learns from a teacher on the images of both.

    Each domain is augmented and normalised by its own data module; then its images get the pair's size and channels,
    and training images are rotated and scaled.

    Args:
        source: Where the labels are; ``batch_size`` is its.
        target: Its ``batch_size`` is that of its evaluation.
        size: Height and width of all images; ``None`` for those of the larger domain.
        rotation: Largest angle, in degrees, by which training images of both domains are turned at random.
        scaling: Largest share by which they are stretched along either axis, and sheared; see :func:`draw_affine`.
        joined: Whether a training batch is one :class:`Batch`, the source's images and then the target's.

    Raises:
        ValueError: If an argument lies outside its range, the classes or channels of the two do not fit together, or
            the target mixes labels.

    Example:
        >>> from kd_lightning.data import DigitsDataModule
        >>> pair = DomainPairDataModule(DigitsDataModule(batch_size=32), DigitsDataModule(), size=16)
        >>> batch, _, _ = next(iter(pair.train_dataloader()))
        >>> source, target = pair.view(batch["source"]), pair.view(batch["target"])
        >>> source.images.shape, target.labels.unique()
        (torch.Size([32, 1, 16, 16]), tensor([-1]))
    """

    views = None
    """Each part may have fixed views; the pair's batches have none that a cache could number."""

    def __init__(
        self,
        source: ImageDataModule,
        target: ImageDataModule,
        size: int | None = None,
        rotation: float = 0.0,
        scaling: float = 0.0,
        joined: bool = False,
    ) -> None:
        check_size(size)
        if not 0 <= rotation <= 180 or not 0 <= scaling < 1:
            raise UserError(
                f"rotation must lie in [0, 180] degrees and scaling in [0, 1), got {rotation} and {scaling}."
            )
        if target.mixup or target.cutmix:
            raise UserError("mixup and CutMix mix labels, which the target does not give; set both to 0 there.")
        if joined and (source.mixup or source.cutmix):
            raise UserError("A joined batch has labels, not shares of them; set the source's mixup and cutmix to 0.")
        self.source = source
        self.target = target
        self.joined = joined
        self.size = size
        self.rotation = rotation
        self.scaling = scaling
        super().__init__()
        if _given_hyperparameters.get() is None:
            plain = {"size": size, "rotation": rotation, "scaling": scaling, "joined": joined}
            self.save_hyperparameters({"source": dict(source.hparams), "target": dict(target.hparams), **plain})
        else:  # of the command line, which are plain as well
            self.save_hyperparameters()

    @property
    def trainer(self) -> pl.Trainer | None:
        """The trainer, which the two parts share."""
        return self.source.trainer

    @trainer.setter
    def trainer(self, trainer: pl.Trainer | None) -> None:
        self.source.trainer = self.target.trainer = trainer

    @property
    def yields_pairs(self) -> bool:
        """Whether a training batch keeps the domains apart."""
        return not self.joined

    @property
    def batch_size(self) -> int:
        """Images of each domain in a training batch, of one process."""
        return self.source.batch_size

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the labels."""
        return self.source.classes

    @property
    def num_classes(self) -> int:
        """The number of classes, C."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of all images."""
        if self.size is not None:
            return self._channels, self.size, self.size
        (_, *ours), (_, *theirs) = self.source.image_shape, self.target.image_shape
        return self._channels, max(ours[0], theirs[0]), max(ours[1], theirs[1])

    @property
    def splits(self) -> dict[str, ImageSet]:
        """The sets that were read, whose labels were looked at."""
        parts = (("source", self.source), ("target", self.target))
        return {f"{domain}/{name}": images for domain, part in parts for name, images in part.splits.items()}

    @property
    def mean(self) -> tuple[float, ...]:
        """Of each channel of the target's images."""
        return statistics(self.target.mean, self._channels)

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel of the target's images."""
        return statistics(self.target.std, self._channels)

    @property
    def mixes_images(self) -> bool:
        """Whether mixup or CutMix blends the source's training images."""
        return self.source.mixes_images

    @property
    def predict_split(self) -> str:
        """The images of the target that ``predict`` shows."""
        return self.target.predict_split

    @predict_split.setter
    def predict_split(self, split: str) -> None:
        self.target.predict_split = split

    def image_name(self, split: str, sample: int) -> str:
        """The file of a sample of the target, or its number."""
        return self.target.image_name(split, sample)

    def prepare_data(self) -> None:
        """Download what the two need."""
        self.source.prepare_data()
        self.target.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Read what a stage needs, of the source nothing but for training and validation; look whether they fit."""
        ours, theirs = self.source.classes, self.target.classes
        if theirs and ours != theirs:
            raise UserError(
                f"The source has {len(ours)} classes ({_few(ours)}) and the target {len(theirs)} ({_few(theirs)}); "
                "give both the same names in the same order."
            )
        channels = len(self.source.mean), len(self.target.mean)
        if channels[0] != channels[1] and 1 not in channels:
            raise UserError(
                f"The source's images have {channels[0]} channels and the target's {channels[1]}; only grey images can "
                "be given more."
            )
        self.target.setup(stage)
        if str(getattr(stage, "value", stage) or "fit") in ("fit", "validate"):
            self.source.setup(stage)

    def teardown(self, stage: str) -> None:
        """Tell both."""
        self.source.teardown(stage)
        self.target.teardown(stage)

    def on_exception(self, exception: BaseException) -> None:
        """Tell both."""
        self.source.on_exception(exception)
        self.target.on_exception(exception)

    def state_dict(self) -> dict[str, Any]:
        """Of both."""
        return {"source": self.source.state_dict(), "target": self.target.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """To both."""
        self.source.load_state_dict(state_dict["source"])
        self.target.load_state_dict(state_dict["target"])

    def train_dataloader(self) -> CombinedLoader:
        """Batches of both, shuffled, of one size."""
        source = self.source.train_dataloader()
        target = self._without_labels(self.target.train_dataloader(), source)
        return CombinedLoader({"source": _of("source", source), "target": _of("target", target)}, "min_size")

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """The validation images of the source, then (unless joined) of the target, each once."""
        source = _of("source", self.source.val_dataloader())
        return source if self.joined else [source, _of("target", self.target.val_dataloader())]

    def test_dataloader(self) -> DataLoader:
        """The target's test images, each once."""
        return _of("target", self.target.test_dataloader())

    def predict_dataloader(self) -> DataLoader:
        """The target's images to predict, in order."""
        return _of("target", self.target.predict_dataloader())

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Turn what was stored into what a module sees."""
        if isinstance(batch, dict):
            seen = {domain: self.on_after_batch_transfer(part) for domain, part in batch.items()}
            return Batch(*map(torch.cat, zip(seen["source"], seen["target"], strict=True))) if self.joined else seen
        if not isinstance(batch, RawBatch):
            return batch
        return self.trainer.precision_plugin.convert_input(self.view(batch))  # type: ignore[union-attr]

    def view(self, batch: RawBatch) -> Batch:
        """Gather, augment, normalise and resize a batch of one of the domains on the device where it lies."""
        domain, _, store = batch.store.partition("/")
        part = self.source if domain == "source" else self.target
        seen = part.view(batch._replace(store=store))
        channels, height, width = self.image_shape
        images = resize(seen.images, (height, width))
        if batch.epoch >= 0 and (self.rotation or self.scaling):
            drawn = draw_affine(part.view_seed, batch.ids, batch.epoch, self.rotation, self.scaling)
            images = transform(images, drawn, [-mean / std for mean, std in zip(part.mean, part.std, strict=True)])
        return seen._replace(images=with_channels(images, channels))

    @property
    def _channels(self) -> int:
        return max(len(self.source.mean), len(self.target.mean))

    def _without_labels(self, target: DataLoader, source: DataLoader) -> EpochLoader:
        """The target's training images for as many batches as the source has, of the same size."""
        shown, order = target.dataset, source.sampler
        assert isinstance(shown, Part)
        assert isinstance(order, EpochSampler)
        hidden = shown.images._replace(labels=torch.full_like(shown.images.labels, -1))
        part = Part(hidden, shown.samples, shown.store, shown.epoch)
        return EpochLoader(
            part,
            batch_size=order.batch_size,
            sampler=EpochSampler(
                part, order.batch_size, True, self.target.seed, order.num_replicas, order.rank, steps=len(source)
            ),
            num_workers=target.num_workers,
            collate_fn=target.collate_fn,
            pin_memory=target.pin_memory,
            persistent_workers=target.persistent_workers,
        )


def _of(domain: str, loader: DataLoader) -> DataLoader:
    """A loader whose batches name their domain."""
    part = loader.dataset
    assert isinstance(part, Part)
    part.store = f"{domain}/{part.store}"
    return loader


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
