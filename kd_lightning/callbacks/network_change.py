"""Duties of a callback that changes the network while it trains."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from kd_lightning.errors import UserError


def check_epoch(trainer: pl.Trainer, action: str, epoch: int) -> None:
    """Raise if the training ends before a callback acts.

    Args:
        trainer: The trainer, before the first step.
        action: The callback and its verb, for the message.
        epoch: The epoch of the action, counted from 0.

    Raises:
        UserError: If the training ends before that epoch.
    """
    last = trainer.max_epochs
    if last is not None and 0 <= last <= epoch:
        raise UserError(
            f"{action} in epoch {epoch}, counted from 0, but the training ends after {last} epochs; set "
            f"trainer.max_epochs to {epoch + 1} or more, or choose an earlier epoch."
        )


def reset_best(trainer: pl.Trainer) -> None:
    """Reset the best score of checkpoints and early stopping, because the network is smaller or coarser from now on.

    Otherwise the best checkpoint would be one of the unchanged network, which is nearly always more accurate. Its file
    is kept until the next epoch replaces it.
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
