"""What a run needs, beside Lightning's own state, to go on to the same bits."""

import math
from hashlib import blake2b
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor


class ExactResume(pl.Callback):
    """Makes randomness in networks a function of (seed, step, rank), and keeps what an epoch has summed up so far.

    The modules of this package attach it themselves. Before each batch torch's generator (and the device's) is seeded,
    so that dropout is the same whether a run was cut or not; the seed is the one that was set when the run began.
    Sums over the epoch, and gradients where a checkpoint is written between two steps of an optimizer, are kept of
    each rank.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self._gradients_wait = False
        self._loaded: dict[str, Any] = {}
        self._places: list[Any] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Agree on the seed."""
        if self.seed is None:
            self.seed = int(trainer.strategy.broadcast(torch.initial_seed()))

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take up the place in the data, sums and gradients."""
        # Lightning leaves the loaders' states out where something asked for the number of steps before
        for loader, state in zip(CombinedLoader(trainer.train_dataloader).flattened, self._places, strict=False):
            if state and hasattr(loader, "load_state_dict"):
                loader.load_state_dict(state)
        kept, self._loaded, self._places = self._loaded, {}, []
        if not kept:
            return
        if kept["sums"] is not None:
            pl_module.training_seconds = kept["seconds"]
            pl_module.means.load_state_dict({**kept, "sums": _of_rank(kept["sums"], trainer, pl_module.device)})
        if kept["skipped"] is not None:
            pl_module.finite.skipped = torch.tensor(kept["skipped"], device=pl_module.device)
        pl_module.finite.buffers = {name: buffer.to(pl_module.device) for name, buffer in kept["buffers"].items()}
        weights = dict(pl_module.named_parameters())
        for name, gradients in kept["gradients"].items():
            weights[name].grad = _of_rank(gradients, trainer, pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the generators."""
        assert self.seed is not None
        seed = _mixed(self.seed, trainer.fit_loop.total_batch_idx, trainer.global_rank)
        torch.default_generator.manual_seed(seed)
        if pl_module.device.type == "cuda":
            torch.cuda.default_generators[pl_module.device.index or 0].manual_seed(seed)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gradients wait for the optimizer."""
        self._gradients_wait = True

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """It uses them now."""
        self._gradients_wait = False

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add each rank's sums and gradients (all ranks save at the same step)."""
        kept = pl_module.means.state_dict()
        gradients, buffers, skipped = {}, {}, pl_module.finite.skipped
        if self._gradients_wait:
            buffers = pl_module.finite.buffers
            weights = pl_module.named_parameters()
            gradients = {name: _of_all(weight.grad, trainer) for name, weight in weights if weight.grad is not None}
        sums = None if kept["sums"] is None else _of_all(kept["sums"], trainer)
        checkpoint["exact_resume"] = {
            **kept,
            "sums": sums,
            "seconds": pl_module.training_seconds,
            "gradients": gradients,
            "buffers": buffers,
            "skipped": None if skipped is None else int(skipped),
            "seed": self.seed,
        }
        if trainer.training:
            mark_validation_pending(checkpoint["loops"]["fit_loop"], trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up the seed; the rest once the weights are where they belong."""
        if trainer.state.fn != "fit":  # a checkpoint that is tested says nothing of the next fit
            return
        self._loaded = dict(checkpoint.get("exact_resume", {}))
        self.seed = self._loaded.pop("seed", None)
        self._places = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])


def mark_validation_pending(progress: dict[str, Any], trainer: pl.Trainer) -> None:
    """After a batch that validation or the end of the epoch follows: as if cut when validation had just begun.

    From its own state Lightning would go on with the next batch, or epoch.
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


def _of_all(value: Tensor, trainer: pl.Trainer) -> Tensor:
    """``(ranks, ...)``."""
    if trainer.world_size == 1:
        return value.unsqueeze(0)
    shares = [torch.empty_like(value) for _ in range(trainer.world_size)]
    dist.all_gather(shares, value.contiguous())
    return torch.stack(shares)


def _of_rank(values: Tensor, trainer: pl.Trainer, device: torch.device) -> Tensor:
    """This rank's of ``(ranks, ...)``; the mean where a run goes on with another number of them."""
    same = len(values) == trainer.world_size
    return (values[trainer.global_rank] if same else values.mean(0)).to(device)


def _mixed(*keys: int) -> int:
    """64 bits that have nothing in common with those of neighbours."""
    return int.from_bytes(blake2b(repr(keys).encode(), digest_size=8).digest(), "little")
