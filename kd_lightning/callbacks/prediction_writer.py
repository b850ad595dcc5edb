"""Writes predictions as a table."""

import csv
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter

from kd_lightning.callbacks.gather_rows import gather_rows
from kd_lightning.data.loader_checks import flattened
from kd_lightning.errors import OutputExistsError
from kd_lightning.files.atomic import atomic_write
from kd_lightning.files.several_labels import join_labels
from kd_lightning.networks.data_config import data_config

_Row = tuple[int, int | list[bool], float | list[float]]
"""Number of an image, its label and the probability; or which classes it is given, and the probabilities of all."""


class PredictionWriter(BasePredictionWriter):
    """Writes predictions as CSV with the columns image (file or index), label, probability; one file for all processes.

    Where an image may have several classes, label and probability are those of the classes that it is given, joined by
    ``;``, the most probable first, and ``-`` for none: as in a CSV file of labels.

    Broken images, which :class:`~kd_lightning.data.ImageFolderDataModule` leaves out, are named in ``left_out``.

    Args:
        path: Path of the file; by default ``predictions.csv`` in the folder of the run, with a number if that exists.

    Raises:
        OutputExistsError: If ``path`` exists.

    Example:
        >>> writer = PredictionWriter("predictions.csv")  # pass it to a Trainer, and call predict
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__("batch")
        self.path = None if path is None else Path(path).expanduser()
        self.written: Path | None = None
        self.left_out: list[str] = []
        self.count = 0
        self._rows: list[_Row] = []

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that no file would be overwritten, before anything is computed."""
        self._rows = []
        if self.path is not None and self.path.exists():
            raise OutputExistsError(f"{str(self.path)!r} exists; name another file for the predictions.")

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep the rows of a batch."""
        ids, labels, probabilities = prediction
        first = len(self._rows)
        numbers = range(first, first + len(labels)) if ids is None else ids.tolist()
        self._rows += zip(numbers, labels.tolist(), probabilities.tolist(), strict=True)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather the rows of all ranks and write them."""
        rows = gather_rows(self._rows, trainer=trainer)
        data = trainer.datamodule  # type: ignore[attr-defined]
        left_out = [*getattr(data, "left_out", ())]
        for loader in flattened(trainer.predict_dataloaders):
            left_out += getattr(loader, "left_out", ())
        self.left_out = sorted(set(gather_rows([str(error) for error in left_out], trainer=trainer)))
        self.count = len(rows) + len(self.left_out)
        if trainer.world_size > 1:
            rows.sort()
        folder = trainer.log_dir or trainer.default_root_dir  # on all ranks, since Lightning broadcasts it
        if trainer.is_global_zero:
            # images without labels have no classes of their own
            classes = getattr(data, "classes", None) or data_config(getattr(pl_module, "network", None)).classes
            named = [_named(row, data, classes) for row in rows]
            table = StringIO(newline="")
            csv.writer(table).writerows([("image", "label", "probability"), *named])
            self.written = self.path or _unused_path(Path(folder))
            with atomic_write(self.written) as file:
                file.write(table.getvalue().encode())


def _named(row: _Row, data: object, classes: Sequence[str] | None) -> tuple[str, str, str]:
    sample, label, probability = row
    name = data.image_name("predict", sample) if hasattr(data, "image_name") else str(sample)
    if isinstance(label, list) and isinstance(probability, list):
        return (name, *join_labels(label, probability, classes or list(map(str, range(len(label)))), digits=6))
    assert isinstance(label, int)
    return name, classes[label] if classes else str(label), f"{probability:.6f}"


def _unused_path(folder: Path) -> Path:
    path, number = folder / "predictions.csv", 1
    while path.exists():
        path, number = folder / f"predictions-{number}.csv", number + 1
    return path
