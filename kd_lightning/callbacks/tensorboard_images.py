"""Images, figures and hyper-parameters for TensorBoard."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from kd_lightning.callbacks.class_accuracy_figure import class_accuracy_figure
from kd_lightning.callbacks.confusion_figure import confusion_figure
from kd_lightning.callbacks.image_grid import image_grid, label_captions
from kd_lightning.callbacks.label_figure import label_figure
from kd_lightning.callbacks.label_results import named_label_results
from kd_lightning.callbacks.step_hooks import CallbackWithoutIdleHooks
from kd_lightning.callbacks.tag_descriptions import describe_tags
from kd_lightning.callbacks.view_grid import first_views
from kd_lightning.data.batch import LoadedBatch, finished, images_for_teacher
from kd_lightning.data.domain_pair import DomainPairDataModule
from kd_lightning.data.protocol import is_multi_label
from kd_lightning.data.read_batch import read_batch
from kd_lightning.data.shapes import statistics

HP_METRIC, HP_METRIC_OF_SEVERAL = "hp/test_accuracy", "hp/test_map"


class TensorBoardImages(CallbackWithoutIdleHooks):
    """Draws training images, the teacher's probabilities for some of them, confusion and the accuracy of each class.

    One grid shows images of the first batch as the network sees them, augmented, with the name of the class below each;
    there is one for each of two domains. Another shows some images in the views of the first epochs. Confusion and
    accuracies are those of the validation images after the last epoch, and of the test images; where an image may have
    several classes, average precision and F1 of each are drawn in their place. The callback fills the hyper-parameters
    tab, with the test accuracy (or mean average precision) as its metric, and adds a description to each tag. Nothing
    happens without a ``TensorBoardLogger``.

    Args:
        images: Number of images in a grid.
        teacher_images: Number of images for which the teacher's softened probabilities are drawn.

    Example:
        >>> pictures = TensorBoardImages(images=64, teacher_images=0)
    """

    def __init__(self, images: int = 32, teacher_images: int = 6) -> None:
        self.images = images
        self.teacher_images = teacher_images

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Describe the tags, and enter the hyper-parameters with a metric that the test will fill in."""
        logger = _tensorboard(trainer)
        if logger is not None:
            describe_tags(logger.experiment)
        if logger is not None and stage == "fit":  # before Lightning enters them with a metric of its own
            data = getattr(trainer.datamodule, "hparams", {})  # type: ignore[attr-defined]
            logger.log_hyperparams(_given({**data, **pl_module.hparams}), {_hp_metric(trainer): -1.0})

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw the first batch of a run."""
        logger = _tensorboard(trainer)
        if logger is None or trainer.global_step > 0 or batch_idx > 0:
            return
        data: object = trainer.datamodule  # type: ignore[attr-defined]
        parts, classes = _domains(finished(batch, data), data), getattr(data, "classes", None) or ()
        for domain, part in parts.items():
            pictures = _denormalize(part.images[: self.images], data, domain)
            captions = label_captions(part.labels[: self.images], classes, multi_label=is_multi_label(data))
            grid = image_grid(pictures, captions)
            logger.experiment.add_image(f"train/images{domain and '_'}{domain}", np.asarray(grid), 0, dataformats="HWC")
        self._draw_views(trainer, logger, data, classes)
        domain, shown = next(iter(parts.items()))
        reference = getattr(pl_module, "reference_logits", None)
        logits = reference(images_for_teacher(shown)[: self.teacher_images]) if reference else None
        if logits is not None:
            pictures = _denormalize(shown.images[: self.teacher_images], data, domain)
            temperature = _temperature(pl_module)
            softened = logits.float() / temperature
            probabilities = softened.sigmoid() if is_multi_label(data) else softened.softmax(1)
            logger.experiment.add_figure(
                "teacher/softened", _bars(pictures[: len(probabilities)], probabilities, temperature), 0
            )

    def _draw_views(self, trainer: pl.Trainer, logger: TensorBoardLogger, data: object, classes: Sequence[str]) -> None:
        views = first_views(trainer, classes)
        if views is not None:
            grid = image_grid(_denormalize(views.images, data, ""), views.captions, columns=views.epochs)
            logger.experiment.add_image("train/views", np.asarray(grid), 0, dataformats="HWC")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw confusion and accuracies of the validation images."""
        self._draw_classes(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw confusion and accuracies of the test images, and enter the test accuracy."""
        logger = self._draw_classes(trainer, pl_module, "test")
        if logger is not None:
            name = _hp_metric(trainer)
            tested = trainer.callback_metrics.get(name.replace("hp/test_", "test/"))
            if tested is not None:
                logger.log_metrics({name: float(tested)}, step=0)

    def _draw_classes(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> TensorBoardLogger | None:
        """Draw the last confusion matrix; return the logger, ``None`` if there is none or nothing was evaluated."""
        logger, confusion = _tensorboard(trainer), getattr(pl_module, "confusion", None)
        if logger is not None and getattr(pl_module, "label_scores", None) is not None:
            if f"{split}/loss" not in trainer.callback_metrics:
                return None
            results = named_label_results(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
            step = trainer.global_step if split == "val" else 0
            logger.experiment.add_figure(f"{split}/per_label", label_figure(results), step)
            return logger
        if logger is None or confusion is None or f"{split}/accuracy" not in trainer.callback_metrics:
            return None  # the matrix may be that of the sanity check
        names = getattr(trainer.datamodule, "classes", None) or range(len(confusion))  # type: ignore[attr-defined]
        classes, step = list(map(str, names)), trainer.global_step if split == "val" else 0
        for name, draw in {"confusion": confusion_figure, "per_class": class_accuracy_figure}.items():
            logger.experiment.add_figure(f"{split}/{name}", draw(confusion, classes=classes), step)
        return logger


def _hp_metric(trainer: pl.Trainer) -> str:
    """Return the metric of the table of hyper-parameters."""
    return HP_METRIC_OF_SEVERAL if is_multi_label(trainer.datamodule) else HP_METRIC  # type: ignore[attr-defined]


def _tensorboard(trainer: pl.Trainer) -> TensorBoardLogger | None:
    loggers = trainer.loggers if trainer.is_global_zero else []
    return next((logger for logger in loggers if isinstance(logger, TensorBoardLogger)), None)


def _domains(batch: Any, data: object) -> dict[str, LoadedBatch]:
    """Return a batch by its domains, one without a name where there are no two."""
    if isinstance(batch, Mapping) and {"source", "target"} <= batch.keys():
        return {domain: read_batch(batch[domain], labelled=False) for domain in ("source", "target")}
    loaded = read_batch(batch, labelled=False, multi_label=is_multi_label(data))
    if not isinstance(data, DomainPairDataModule):
        return {"": loaded}
    half = len(loaded.images) // 2  # with concat, as many images of each
    return {
        "source": loaded._replace(images=loaded.images[:half], labels=loaded.labels[:half]),
        "target": loaded._replace(images=loaded.images[half:], labels=loaded.labels[half:]),
    }


def _denormalize(images: Tensor, data: object, domain: str) -> Tensor:
    """Return images in [0, 1] with 1 or 3 channels; where the statistics are not known, stretched to that range."""
    images = images.detach().float().cpu()
    of: object = getattr(data, domain, data) if domain else data
    mean, std = getattr(of, "mean", None), getattr(of, "std", None)
    channels = images.shape[1]
    if mean is not None and std is not None:
        scale, offset = (torch.tensor(statistics(values, channels=channels))[:, None, None] for values in (std, mean))
        images = images * scale + offset
    images = images if channels == 3 else images[:, :3] if channels > 3 else images[:, :1]
    low, high = images.aminmax()
    if mean is None and (low < 0 or high > 1):
        images = (images - low) / (high - low).clamp(min=1e-6)
    return images.clamp(0, 1)


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that have a value: TensorBoard shows the first five, which would be empty ones."""
    nested = {key: _given(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    return {
        key: value for key, value in nested.items() if not key.startswith("_") and value is not None and value != {}
    }


def _temperature(pl_module: pl.LightningModule) -> float:
    losses = getattr(pl_module, "losses", {}).values()
    return next((loss.temperature for loss in losses if hasattr(loss, "temperature")), 1.0)


def _bars(images: Tensor, probabilities: Tensor, temperature: float) -> Figure:
    columns = min(3, len(images))  # TensorBoard shows a picture 350 pixels wide
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.7 * columns, 3.4 * rows), layout="constrained")
    figure.suptitle(f"Teacher's probabilities at temperature {temperature:g}", fontsize=11)
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for one in axes.flat:
        one.axis("off")
    for number, (image, row) in enumerate(zip(images, probabilities.cpu(), strict=False)):
        place, column = divmod(number, columns)
        axes[2 * place, column].imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray")
        bars = axes[2 * place + 1, column]
        bars.axis("on")
        bars.bar(range(len(row)), row.tolist())
        bars.set_ylim(0, 1)
        bars.set_yticks([0, 1])
        bars.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    return figure
