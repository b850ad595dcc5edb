"""Writes the metrics of a test beside the run."""

import json
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from kd_lightning.callbacks.class_results import class_results
from kd_lightning.callbacks.label_results import LabelResult, named_label_results
from kd_lightning.callbacks.protocol import trained_module
from kd_lightning.callbacks.step_hooks import CallbackWithoutIdleHooks
from kd_lightning.data.read_batch import read_images
from kd_lightning.files.atomic import atomic_write


class RunSummary(CallbackWithoutIdleHooks):
    """Writes ``test.json`` into the folder of a run: the test's metrics, parameters, file size and images per second.

    Args:
        seconds: Duration of the measurement of the speed, on batches of the test images.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RunSummary(seconds=2.0)], accelerator="cpu", logger=False)
    """

    def __init__(self, seconds: float = 0.5) -> None:
        self.seconds = seconds
        self._images: Tensor | None = None

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep one batch to measure the speed with."""
        if self._images is None:
            self._images = read_images(batch)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        images, self._images = self._images, None
        log_dir = trainer.log_dir  # on all ranks, since Lightning broadcasts it
        if not trainer.is_global_zero or log_dir is None or images is None:
            return
        metrics = {
            name.removeprefix("test/"): round(float(value), 6)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("test/")
        }
        checkpoint = trainer.ckpt_path
        report = {
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "file_bytes": Path(checkpoint).stat().st_size if checkpoint else None,
            "parameters": sum(weight.numel() for weight in trained_module(pl_module).network.parameters()),
            "images_per_second": round(images_per_second(pl_module, images, self.seconds), 1),
            "device": str(pl_module.device),
            **metrics,
            **_of_classes(pl_module, getattr(trainer, "datamodule", None)),
        }
        with atomic_write(Path(log_dir, "test.json")) as file:
            file.write(f"{json.dumps(report, indent=2)}\n".encode())


def _of_classes(pl_module: pl.LightningModule, data: object) -> dict[str, Any]:
    """Return images, accuracy and precision of each class, or its average precision and F1 where there are several."""
    scores = getattr(pl_module, "label_scores", None)
    if scores is not None:
        return {"classes": {one.name: _of_label(one) for one in named_label_results(pl_module, data)}}
    confusion = getattr(pl_module, "confusion", None)
    if confusion is None:
        return {}
    names = getattr(data, "classes", None) or range(len(confusion))
    results = class_results(confusion, list(map(str, names)))
    return {
        "classes": {
            one.name: {"images": one.images, "accuracy": _rounded(one.accuracy), "precision": _rounded(one.precision)}
            for one in results
        }
    }


def _of_label(result: LabelResult) -> dict[str, float | None]:
    return {name: _rounded(value) for name, value in result._asdict().items() if name != "name"}


def _rounded(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else round(value, 6)


def images_per_second(network: nn.Module, images: Tensor, seconds: float = 0.5) -> float:
    """Return the images per second of a network for batches of the given size, in its current mode.

    Args:
        network: Network from images to logits.
        images: ``(B, channels, H, W)``.
        seconds: Duration of the measurement, after two batches to warm up.
    """
    batches, start = -2, perf_counter()
    with torch.no_grad():
        while batches < 1 or perf_counter() - start < seconds:
            network(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            batches += 1
            if batches == 0:
                start = perf_counter()
    return batches * len(images) / (perf_counter() - start)
