"""The reason why a training ended early."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info

from kd_lightning.callbacks.metric_direction import check_modes
from kd_lightning.callbacks.step_hooks import CallbackWithoutIdleHooks


class EarlyStopReport(CallbackWithoutIdleHooks):
    """Prints which ``EarlyStopping`` ended the training, and checks before it that its mode fits its metric.

    The modules of this package attach it.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the modes.

        Raises:
            UserError: If a callback would take the worst epoch for the best one.
        """
        if stage == "fit":
            check_modes(trainer.callbacks)  # type: ignore[attr-defined]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the reason."""
        for callback in trainer.early_stopping_callbacks:
            if trainer.should_stop and callback.stopping_reason_message is not None:
                rank_zero_info(_describe(trainer, callback))


def _describe(trainer: pl.Trainer, callback: EarlyStopping) -> str:
    reason, _, _ = (callback.stopping_reason_message or "").partition(" Signaling")
    last = callback.stopped_epoch + 1  # epochs are counted from 1 here
    planned = f" of {trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
    exhausted = callback.wait_count >= callback.patience
    advice = " To train longer, resume with a larger patience or without EarlyStopping." if exhausted else ""
    return f"EarlyStopping ended the training after epoch {last}{planned}: {reason}{advice}"
