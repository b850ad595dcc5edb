"""Checks of the data that a module is trained on."""

import math
from traceback import format_exception
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_lightning.callbacks.step_hooks import CallbackWithoutIdleHooks
from kd_lightning.data.labels import check_labels
from kd_lightning.data.loader_checks import check_not_empty, check_repeatable, last_batch_size
from kd_lightning.data.protocol import ImageData, is_image_data, is_multi_label
from kd_lightning.data.read_batch import check_channels, read_images, read_training_batch
from kd_lightning.errors import UserError, add_user_message, first_line, user_message
from kd_lightning.features import layer_shapes
from kd_lightning.networks.dry_run import first_twice, to_input_dtype

_ACCURACY, _MAP = "val/accuracy", "val/map"


class DataCheck(CallbackWithoutIdleHooks):
    """Checks loaders, batches and labels before they are learned from.

    The modules of this package attach it. Data modules of this package check all their labels when they read them, and
    their images have one shape; other data are checked batch by batch. To check labels waits for a device, which
    happens in the first epoch only.
    """

    def __init__(self) -> None:
        self._first_epoch = 0
        self._shape: tuple[int, ...] = ()

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Check that the data yield what the module trains on: single batches or pairs of domains, and labels.

        Where an image may have several classes, callbacks that follow ``val/accuracy`` follow ``val/map``; where no
        validation image is labelled, ``val/agreement`` with the teacher.

        Raises:
            UserError: If they do not, a loader to evaluate on is empty, or there is nothing to follow.
        """
        data: object = trainer.datamodule  # type: ignore[attr-defined]
        if is_multi_label(data):
            _follow_map(trainer, report=stage == "fit")  # else a checkpoint's callbacks would not be found again
        if stage != "fit":
            if not is_image_data(data):
                _check_evaluation_loaders(trainer, stage)
            return
        pairs, name = getattr(data, "yields_pairs", False), type(pl_module).__name__
        if pl_module.takes_pairs and is_image_data(data) and not pairs:
            raise UserError(
                f"{name} trains on a source and a target; give it a DomainPairDataModule of two data modules, without "
                "concat."
            )
        if pairs and not pl_module.takes_pairs:
            raise UserError(
                f"{name} does not train on pairs of domains; set concat: true in DomainPairDataModule, or use "
                "AdaptationModule."
            )
        if is_image_data(data):
            _check_labelled(trainer, pl_module, data)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Check the loaders' lengths and the batch size.

        Raises:
            UserError: If a validation loader is empty or can be read only once, or if a batch has one image and the
                network has batch norms, which need a variance.
        """
        self._first_epoch, self._shape = trainer.current_epoch, ()
        check_repeatable(trainer.val_dataloaders, "validation")
        if trainer.limit_val_batches and 0 in trainer.num_val_batches:
            check_not_empty(trainer.val_dataloaders, "validation")
        normed = _batch_norms(trainer, pl_module)
        if normed and getattr(trainer.train_dataloader, "batch_size", None) == 1:
            raise UserError("Batch norm needs more than one image in a batch; set batch_size to 2 or more.")
        if normed:
            _check_last_batch(trainer, pl_module, normed)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Check the batches and labels of other data.

        Raises:
            UserError: If a batch cannot be read, its images have other channels than the first one's, or a label is out
                of range.
        """
        if pl_module.num_classes is None or is_image_data(trainer.datamodule):  # type: ignore[attr-defined]
            return
        several = is_multi_label(trainer.datamodule)  # type: ignore[attr-defined]
        (images, labels, *_), _ = read_training_batch(batch, pairs=pl_module.takes_pairs, multi_label=several)
        self._check_images(images, pl_module)
        if trainer.current_epoch == self._first_epoch or labels.device.type == "cpu":
            check_labels(labels, num_classes=pl_module.num_classes, multi_label=several)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Forget an evaluation that was interrupted, and check that the ends of several loaders are known."""
        pl_module.evaluations.clear()
        if not pl_module.takes_pairs:  # whose validation is finished as one, at the end of the epoch
            _check_lengths(trainer.num_val_batches)

    def on_test_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Forget an evaluation that was interrupted, and check that the ends of several loaders are known."""
        pl_module.evaluations.clear()
        _check_lengths(trainer.num_test_batches)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the images of other data, on the first of which the network is tried unless it was before."""
        self._check_evaluated(trainer, pl_module, batch)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the images of other data, on the first of which the network is tried unless it was before."""
        self._check_evaluated(trainer, pl_module, batch)

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the images of other data, on the first of which the network is tried unless it was before."""
        self._check_evaluated(trainer, pl_module, batch)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Say what to do where samples do not make a batch, or a network fails on another batch than the first."""
        if isinstance(exception, UserError) or not isinstance(exception, Exception) or user_message(exception):
            return
        traceback = "".join(format_exception(exception))  # with that of a worker, which is text
        if "in default_collate\n" in traceback:
            add_user_message(
                exception,
                "The samples that the data set returns do not make a batch: they must be tensors of one size; convert "
                "images in its transform, for example by Resize((H, W)), ToImage() and "
                "ToDtype(torch.float32, scale=True).",
            )
        elif "Expected more than 1 value per channel" in str(exception):
            add_user_message(
                exception,
                "A training batch has one image, and batch norm needs at least two values for each channel; set "
                "drop_last=True in the loader, or another batch_size.",
            )
        elif self._shape not in ((), pl_module.image_shape) and "in _call_impl\n" in traceback:  # of nn.Module
            add_user_message(
                exception,
                f"{type(pl_module.network).__name__} fails for images of shape {self._shape}, where the first had the "
                f"shape {pl_module.image_shape} ({first_line(exception)}); give all images the same size.",
            )

    def _check_evaluated(self, trainer: pl.Trainer, pl_module: Any, batch: Any) -> None:
        if is_image_data(trainer.datamodule):  # type: ignore[attr-defined]
            return
        images = read_images(batch)
        if pl_module.image_shape is None and len(images):
            with torch.inference_mode(False):  # in which weights would be converted to ones that cannot be trained
                pl_module.dry_run(first_twice(images))
        self._check_images(images, pl_module)

    def _check_images(self, images: Tensor, pl_module: Any) -> None:
        self._shape = tuple(images.shape[1:])
        check_channels(images, pl_module.image_shape)


def _check_evaluation_loaders(trainer: pl.Trainer, stage: str) -> None:
    name, limit, source = {
        "validate": ("validation", trainer.limit_val_batches, trainer.validate_loop._data_source),
        "test": ("test", trainer.limit_test_batches, trainer.test_loop._data_source),
        "predict": ("prediction", trainer.limit_predict_batches, trainer.predict_loop._data_source),
    }[stage]
    if limit and source.is_defined():
        check_not_empty(source.dataloader(), name)


def _check_lengths(counts: list[int | float]) -> None:
    """Check that loaders have a length if there are several: each is finished in its last step."""
    if len(counts) > 1 and math.inf in counts:
        raise UserError(
            "One of several loaders to evaluate on has no length; give its data set a __len__, or limit the batches "
            "(limit_val_batches, limit_test_batches)."
        )


def _batch_norms(trainer: pl.Trainer, pl_module: Any) -> dict[str, nn.Module]:
    """Return the batch norms that need more than one image in a batch of one process."""
    return {
        name: module
        for name, module in pl_module.network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.training
        and not (isinstance(module, nn.SyncBatchNorm) and trainer.world_size > 1)
    }


def _check_last_batch(trainer: pl.Trainer, pl_module: Any, normed: dict[str, nn.Module]) -> None:
    """Check that batch norms over one value for each image, as behind linear layers, do not get a batch of one."""
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or last_batch_size(loader) != 1:
        return
    if trainer.num_training_batches < len(loader) or isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
        return  # of sharded networks no layers can be run before the first step
    images = to_input_dtype(torch.zeros(2, *pl_module.image_shape), pl_module.network)
    for name, shape in layer_shapes(pl_module.network, pl_module.network_input(images)).items():
        if name in normed and shape[0] == 2 and all(length == 1 for length in shape[2:]):
            raise UserError(
                f"The last training batch of an epoch has one image, of which the batch norm {name!r} gets a single "
                "value for each channel; set drop_last=True in the loader, or another batch_size."
            )


def _check_labelled(trainer: pl.Trainer, pl_module: Any, data: ImageData) -> None:
    if not data.has_labels("train"):
        if not pl_module.learns_without_labels:
            raise UserError(
                f"No training image is labelled, and {type(pl_module).__name__} learns from labels; put images into "
                "train/<class>/, or let a student learn from a teacher."
            )
        rank_zero_info("No training image is labelled, so the student learns from its teacher only.")
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    followed = _MAP if data.multi_label else _ACCURACY
    following = [callback for callback in callbacks if getattr(callback, "monitor", None) == followed]
    if not following or not trainer.limit_val_batches or data.has_labels("val"):
        return
    if not pl_module.learns_without_labels:
        raise UserError(f"No validation image is labelled, so there is no {followed} to follow; label some of them.")
    for callback in following:
        callback.monitor = "val/agreement"
    rank_zero_info(f"No validation image is labelled, so val/agreement with the teacher is followed, not {followed}.")


def _follow_map(trainer: pl.Trainer, *, report: bool) -> None:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    following = [callback for callback in callbacks if getattr(callback, "monitor", None) == _ACCURACY]
    for callback in following:
        callback.monitor = _MAP
    if following and report:
        names = " and ".join(dict.fromkeys(type(callback).__name__ for callback in following))
        rank_zero_info(
            f"An image may have several classes, so {names} follow{'s' * (' and ' not in names)} {_MAP} (mean average "
            f"precision) and not {_ACCURACY}."
        )
