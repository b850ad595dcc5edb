"""State beside Lightning's own with which a run resumes to the same bits."""

import math
from hashlib import blake2b
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.optim import Optimizer

from kd_lightning.callbacks.rank_state import gather_ranks, select_rank
from kd_lightning.callbacks.step_hooks import CallbackWithoutIdleHooks
from kd_lightning.errors import UserError


class ExactResume(CallbackWithoutIdleHooks):
    """Makes randomness in networks a function of (seed, step, rank), and saves accumulated gradients.

    The modules of this package attach it. Before each batch torch's generator (and the device's) is seeded, so that
    dropout is the same in a resumed run; the seed is the one that was set when the run started. If a checkpoint is
    written between two steps of an optimizer, the gradients of each rank are saved.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ExactResume()], accelerator="cpu", logger=False)  # for a module of your own
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self._gradients_pending = False
        self._loaded_gradients: dict[str, Tensor] = {}
        self._loader_states: list[dict[str, Any] | None] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Agree on the seed."""
        if self.seed is None:
            self.seed = int(trainer.strategy.broadcast(torch.initial_seed()))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the position in the data, and gradients."""
        # Lightning does not restore the loaders if something has asked for the number of steps before
        for loader, state in zip(CombinedLoader(trainer.train_dataloader).flattened, self._loader_states, strict=False):
            if state and hasattr(loader, "load_state_dict"):
                loader.load_state_dict(state)
        weights = dict(pl_module.named_parameters())
        for name, gradients in self._loaded_gradients.items():
            weights[name].grad = select_rank(gradients, trainer, pl_module.device)
        self._loaded_gradients, self._loader_states = {}, []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the generators."""
        assert self.seed is not None
        seed = _mix(self.seed, trainer.fit_loop.total_batch_idx, trainer.global_rank)
        torch.default_generator.manual_seed(seed)
        if pl_module.device.type == "cuda":
            torch.cuda.default_generators[pl_module.device.index or 0].manual_seed(seed)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that gradients wait for the optimizer."""
        self._gradients_pending = True

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note that the optimizer uses them."""
        self._gradients_pending = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the seed and each rank's gradients (all ranks save at the same step)."""
        weights = pl_module.named_parameters() if self._gradients_pending else []
        gradients = {name: gather_ranks(weight.grad, trainer) for name, weight in weights if weight.grad is not None}
        checkpoint["exact_resume"] = {"seed": self.seed, "gradients": gradients}
        if trainer.training:
            mark_validation_pending(checkpoint["loops"]["fit_loop"], trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the seed; the rest follows once the weights are on their device.

        Raises:
            UserError: If the run would search another learning rate.
        """
        if trainer.state.fn != "fit":  # a checkpoint that is tested must not change the next fit
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        # Lightning would begin again after the search, whose own checkpoint has no steps
        if checkpoint["global_step"] > 0 and any(isinstance(callback, LearningRateFinder) for callback in callbacks):
            raise UserError("A resumed run keeps its own learning rate; remove the callback that searches one.")
        saved = checkpoint.get("exact_resume", {})
        self.seed, self._loaded_gradients = saved.get("seed"), saved.get("gradients", {})
        self._loader_states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])


def mark_validation_pending(progress: dict[str, Any], trainer: pl.Trainer) -> None:
    """Change a saved state, after a batch that validation or the epoch's end follows, so that these are run on resume.

    With its own state Lightning would continue with the next batch or epoch.

    Args:
        progress: Lightning's state of the fit loop; it is changed.
        trainer: Trainer that saves.
    """
    batches, validated = progress["epoch_loop.batch_progress"], progress["epoch_loop.val_loop.batch_progress"]
    due = batches["is_last_batch"] or (
        trainer.enable_validation and batches["current"]["ready"] % (trainer.val_check_batch or math.inf) == 0
    )
    within_hook = batches["total"]["completed"] == batches["total"]["processed"] - 1
    resumable = all(hasattr(loader, "load_state_dict") for loader in CombinedLoader(trainer.train_dataloader).flattened)
    if due and within_hook and resumable:
        for counts in (batches["total"], batches["current"]):
            counts["completed"] += 1
        done = validated["total"]["completed"]
        validated["total"].update(ready=done + 1, started=done + 1, processed=done)
        validated["current"].update(ready=1, started=1, processed=0, completed=0)


def _mix(*keys: int) -> int:
    """Return 64 bits that are unrelated to those of neighbouring keys."""
    return int.from_bytes(blake2b(repr(keys).encode(), digest_size=8).digest(), "little")
