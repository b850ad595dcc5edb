"""Predictions as a table."""

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from kd_lightning.errors import OutputExistsError

_Row = tuple[int, int, float]


class PredictionWriter(pl.Callback):
    """Writes what ``predict`` found as CSV: file or index, label, probability; one file for all processes.

    Args:
        path: Of the file; by default ``predictions.csv`` in the folder of the run, with a number where it exists.

    Raises:
        FileExistsError: If ``path`` exists.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.written: Path | None = None
        self._rows: list[_Row] = []

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to overwrite a file before anything is computed."""
        self._rows = []
        if self.path is not None and Path(self.path).exists():
            raise OutputExistsError(f"{self.path!r} exists; name another file for the predictions.")

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rows of a batch."""
        ids, labels, probabilities = outputs
        first = len(self._rows)
        numbers = range(first, first + len(labels)) if ids is None else ids.tolist()
        self._rows += zip(numbers, labels.tolist(), probabilities.tolist(), strict=True)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the ranks' rows together and write them."""
        rows = self._rows
        if trainer.world_size > 1:
            shares: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(shares, rows)
            rows = sorted(row for share in shares for row in share)
        folder = trainer.log_dir or trainer.default_root_dir  # all ranks ask: the answer is broadcast
        if trainer.is_global_zero:
            data = trainer.datamodule  # type: ignore[attr-defined]
            self.written = Path(self.path) if self.path else _free(Path(folder))
            self.written.parent.mkdir(parents=True, exist_ok=True)
            with self.written.open("x", newline="") as file:
                table = csv.writer(file)
                table.writerow(["image", "label", "probability"])
                table.writerows(_named(row, data) for row in rows)


def _named(row: _Row, data: Any) -> tuple[str, str, str]:
    sample, label, probability = row
    name = data.image_name("predict", sample) if hasattr(data, "image_name") else str(sample)
    classes = getattr(data, "classes", None)
    return name, classes[label] if classes else str(label), f"{probability:.6f}"


def _free(folder: Path) -> Path:
    path, number = folder / "predictions.csv", 1
    while path.exists():
        path, number = folder / f"predictions-{number}.csv", number + 1
    return path
