"""Writes outputs of layers to a file that NumPy opens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter

from kd_lightning.callbacks.gather_rows import gather_rows
from kd_lightning.data.protocol import is_image_data
from kd_lightning.data.read_batch import read_to_predict
from kd_lightning.errors import OutputExistsError, UserError
from kd_lightning.features import FeatureTap, evaluating
from kd_lightning.files.atomic import atomic_write


class FeatureWriter(BasePredictionWriter):
    """Writes, after ``predict``, the outputs of layers with labels, ids and logits to an ``.npz`` file.

    Arrays: each layer by its name ``(N, ...)``, ``logits`` ``(N, C)``, ``labels`` and ``ids`` ``(N,)``. Images are
    processed as in evaluation, without augmentation.

    Args:
        layers: Dotted names as in ``named_modules()`` of the network; nothing is written if there are none.
        path: Path of the file; ``features.npz`` in the folder of the run if ``None``.
        split: Images of the data module to process.

    Raises:
        OutputExistsError: If ``path`` exists.
        UserError: If a ``split`` is chosen of data that have none.

    Example:
        >>> writer = FeatureWriter(["avgpool"], "features.npz", split="train")
    """

    def __init__(
        self,
        layers: list[str] | None = None,
        path: str | None = None,
        split: Literal["predict", "train", "val", "test"] = "predict",
    ) -> None:
        super().__init__("batch")
        self.layers = list(layers or [])
        self.path = None if path is None else Path(path).expanduser()
        self.split = split
        self.written: Path | None = None
        self._tap: FeatureTap | None = None
        self._rows: list[dict[str, np.ndarray]] = []

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Check the names and the path before anything is computed."""
        super().setup(trainer, pl_module, stage)
        if stage != "predict" or not self.layers:
            return
        if self.path is not None and self.path.exists():
            raise OutputExistsError(f"{str(self.path)!r} exists; name another file for the features.")
        self._tap = FeatureTap(pl_module.network, self.layers)
        self._rows = []
        if self.split != "predict":
            data: object = trainer.datamodule  # type: ignore[attr-defined]
            if not is_image_data(data):
                raise UserError(
                    f"FeatureWriter can choose the split {self.split!r} in data modules of kd_lightning only; give "
                    "predict the loader of these images, and leave out split."
                )
            data.predict_split = self.split

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Read the layers."""
        if self._tap is None:
            return
        images, labels, ids, _ = read_to_predict(batch)
        with evaluating(pl_module.network):
            outputs = self._tap(pl_module.network_input(images))
        first = sum(len(rows["labels"]) for rows in self._rows)
        numbers = torch.arange(first, first + len(labels)) if ids is None else ids
        tensors = {**outputs.features, "logits": outputs.logits, "labels": labels, "ids": numbers}
        self._rows.append({name: _plain(tensor) for name, tensor in tensors.items()})

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather the rows of all ranks and write them in the order of the images."""
        if self._tap is None:
            return
        self._tap.remove()
        rows = gather_rows(self._rows, trainer=trainer)
        folder = trainer.log_dir or trainer.default_root_dir  # on all ranks, since Lightning broadcasts it
        if trainer.is_global_zero:
            arrays: dict[str, Any] = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
            order = arrays["ids"].argsort(kind="stable")
            self.written = self.path or Path(folder, "features.npz")
            with atomic_write(self.written) as file:
                np.savez(file, **{name: array[order] for name, array in arrays.items()})


def _plain(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().float().numpy() if tensor.is_floating_point() else tensor.cpu().numpy()
