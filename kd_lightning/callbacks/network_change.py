"""What a callback owes to others when it makes another network of the one that trains."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from kd_lightning.errors import UserError


def check_epoch(trainer: pl.Trainer, what: str, epoch: int) -> None:
    """Before the first step.

    Raises:
        ValueError: If the training ends before that epoch, counted from 0.
    """
    last = trainer.max_epochs
    if last is not None and 0 <= last <= epoch:
        raise UserError(
            f"{what} in epoch {epoch}, counted from 0, but the training ends after {last}; set trainer.max_epochs to "
            f"{epoch + 1} or more, or let it be earlier."
        )


def reset_best(trainer: pl.Trainer) -> None:
    """Epochs before are not compared with those to come, which are of a smaller or coarser network.

    Else the best checkpoint would be one of the network as it was, which is nearly always more accurate. Its file stays
    until the next epoch takes its place.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, ModelCheckpoint | EarlyStopping):
            continue
        worst = torch.tensor(-torch.inf if callback.mode == "max" else torch.inf)
        if isinstance(callback, EarlyStopping):
            callback.best_score, callback.wait_count = worst, 0
        elif callback.monitor is not None:
            callback.best_k_models = dict.fromkeys(callback.best_k_models, worst)
            callback.best_model_score = callback.kth_value = worst
