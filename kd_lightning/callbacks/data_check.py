"""Checks of the data that a module is trained on."""

from typing import Any

import lightning.pytorch as pl
from torch import nn

from kd_lightning.data.labels import check_labels
from kd_lightning.data.protocol import is_image_data
from kd_lightning.errors import UserError


class DataCheck(pl.Callback):
    """Checks batches and labels before they are learned from.

    The modules of this package attach it. Data modules of this package check all their labels when they read them; the
    labels of other data are checked batch by batch, on a device where the check waits for it in the first epoch only.
    """

    def __init__(self) -> None:
        self._first_epoch = 0

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Check that the data yield what the module trains on: single batches, or pairs of domains.

        Raises:
            UserError: If they do not.
        """
        if stage != "fit":
            return
        data: object = trainer.datamodule  # type: ignore[attr-defined]
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

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Check the batch size.

        Raises:
            UserError: If it is one and the network has batch norms, which need a variance.
        """
        self._first_epoch = trainer.current_epoch
        normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in pl_module.network.modules())
        if normed and getattr(trainer.train_dataloader, "batch_size", None) == 1:
            raise UserError("Batch norm needs more than one image in a batch; set batch_size to 2 or more.")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Check the labels of other data.

        Raises:
            UserError: If a label is out of range.
        """
        if pl_module.num_classes is None or is_image_data(trainer.datamodule):  # type: ignore[attr-defined]
            return
        labels = (batch["source"] if isinstance(batch, dict) else batch)[1]
        if trainer.current_epoch == self._first_epoch or labels.device.type == "cpu":
            check_labels(labels, num_classes=pl_module.num_classes)
