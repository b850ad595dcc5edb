"""Images, figures and hyper-parameters for TensorBoard."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

from kd_lightning.callbacks.confusion_figure import confusion_figure
from kd_lightning.data.read_batch import read_images

HP_METRIC = "hp/test_accuracy"


class TensorBoardImages(pl.Callback):
    """Draws a grid of training images, the teacher's probabilities for some of them, and the test's confusion matrix.

    It also fills the hyper-parameters tab, with the test accuracy as its metric. Nothing happens without a
    ``TensorBoardLogger``.

    Args:
        images: Number of images in the grid.
        teacher_images: Number of images for which the teacher's softened probabilities are drawn.
    """

    def __init__(self, images: int = 32, teacher_images: int = 6) -> None:
        self.images = images
        self.teacher_images = teacher_images

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Enter the hyper-parameters with a metric that the test will fill in."""
        logger = _tensorboard(trainer)
        if logger is not None and stage == "fit":  # before Lightning enters them with a metric of its own
            data = getattr(trainer.datamodule, "hparams", {})  # type: ignore[attr-defined]
            plain = {key: value for key, value in {**data, **pl_module.hparams}.items() if not key.startswith("_")}
            logger.log_hyperparams(plain, {HP_METRIC: -1.0})

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw the first batch of a run."""
        logger = _tensorboard(trainer)
        if logger is None or trainer.global_step > 0 or batch_idx > 0:
            return
        # of a pair the target's, as the data's statistics are
        images = read_images(batch["target"] if isinstance(batch, dict) else batch)
        pictures = _denormalize(images[: self.images], trainer.datamodule)  # type: ignore[attr-defined]
        logger.experiment.add_image("train/images", make_grid(pictures), 0)
        reference = getattr(pl_module, "reference_logits", None)
        logits = reference(images[: self.teacher_images]) if reference else None
        if logits is not None:
            temperature = _temperature(pl_module)
            probabilities = (logits.float() / temperature).softmax(1)
            logger.experiment.add_figure(
                "teacher/softened", _bars(pictures[: len(probabilities)], probabilities, temperature), 0
            )

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the confusion matrix and enter the test accuracy."""
        logger, confusion = _tensorboard(trainer), getattr(pl_module, "confusion", None)
        if logger is None or confusion is None:
            return
        names = getattr(trainer.datamodule, "classes", None) or range(len(confusion))  # type: ignore[attr-defined]
        figure = confusion_figure(confusion, classes=list(map(str, names)))
        logger.experiment.add_figure("test/confusion", figure, 0)
        logger.log_metrics({HP_METRIC: float(trainer.callback_metrics["test/accuracy"])}, step=0)


def _tensorboard(trainer: pl.Trainer) -> TensorBoardLogger | None:
    loggers = trainer.loggers if trainer.is_global_zero else []
    return next((logger for logger in loggers if isinstance(logger, TensorBoardLogger)), None)


def _denormalize(images: Tensor, data: object) -> Tensor:
    images = images.detach().float().cpu()
    mean, std = getattr(data, "mean", None), getattr(data, "std", None)
    if mean is not None and std is not None:
        images = images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return images[:, :3].clamp(0, 1)


def _temperature(pl_module: pl.LightningModule) -> float:
    losses = getattr(pl_module, "losses", {}).values()
    return next((loss.temperature for loss in losses if hasattr(loss, "temperature")), 1.0)


def _bars(images: Tensor, probabilities: Tensor, temperature: float) -> Figure:
    figure = Figure(figsize=(2 * len(images), 4), layout="constrained")
    axes = figure.subplots(2, len(images), squeeze=False)
    for column, (image, row) in enumerate(zip(images, probabilities.cpu(), strict=False)):
        axes[0, column].imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray")
        axes[0, column].axis("off")
        axes[1, column].bar(range(len(row)), row.tolist())
        axes[1, column].set_ylim(0, 1)
    figure.suptitle(f"The teacher's probabilities at temperature {temperature:g}")
    return figure
