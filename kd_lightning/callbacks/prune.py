"""Structured pruning while a network trains."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_lightning.callbacks.channel_selection import (
    Importance,
    Measure,
    channels_to_keep,
    cost,
    same_features,
    torch_pruning,
)
from kd_lightning.callbacks.network_change import check_epoch, reset_best
from kd_lightning.callbacks.protocol import trained_module
from kd_lightning.callbacks.rewrap import rewrap
from kd_lightning.errors import UserError
from kd_lightning.losses import Objective
from kd_lightning.networks.channel_slicing import select, select_entries
from kd_lightning.networks.copying import copy_network


class PruneNetwork(pl.Callback):
    """Removes whole channels of the trained network at the start of epochs, and training continues with the rest.

    The teacher, the classifier's outputs and the width of layers that a loss reads are not changed. The optimizer keeps
    the state of the weights that remain. Checkpoints contain the network's new widths, with which every command builds
    it; the best one is taken from the epochs after the last pruning. With several processes, rank 0 selects the
    channels.

    Args:
        keep: The final fraction of the cost, in (0, 1).
        measure: The cost: ``"macs"`` (multiply-accumulates of one image), ``"parameters"``, or ``"latency"`` (measured
            at batch 1 on the CPU; varies between runs).
        importance: The criterion by which channels of all layers are compared: ``"magnitude"`` of weights,
            ``"bn_scale"``, or ``"taylor"``, weights times the gradients of the previous epoch.
        epochs: The epochs in which channels are removed, counted from 0; each removes an equal part of the cost.
        round_to: Divisor of the remaining widths, where possible.

    Raises:
        UserError: If an argument is outside its range; in ``fit``, before the first step, if the network cannot be
            traced, cannot become this small, is compiled or averaged, or if the training ends before the last epoch of
            ``epochs``.

    Example:
        >>> prune = PruneNetwork(0.5, epochs=[2, 4, 6])
    """

    def __init__(
        self,
        keep: float = 0.5,
        *,
        measure: Measure = "macs",
        importance: Importance = "magnitude",
        epochs: Sequence[int] = (0,),
        round_to: int = 1,
    ) -> None:
        if not 0 < keep < 1:
            raise UserError(f"keep must be between 0 and 1, got {keep}.")
        if not epochs or min(epochs) < 0 or len(set(epochs)) < len(epochs):
            raise UserError(f"epochs must be one or several different numbers >= 0, got {list(epochs)}.")
        if round_to < 1:
            raise UserError(f"round_to must be >= 1, got {round_to}.")
        if importance == "taylor" and min(epochs) == 0:
            raise UserError(
                "taylor needs the gradients of the previous epoch, but epochs contains 0; start at epoch 1 or later."
            )
        torch_pruning()
        self.keep = keep
        self.measure: Measure = measure
        self.importance: Importance = importance
        self.epochs = sorted(epochs)
        self.round_to = round_to
        self._done: list[int] = []
        self._unpruned_cost: float | None = None
        self._gradients: dict[str, Tensor] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise if the run cannot be pruned."""
        if stage != "fit":
            return
        check_epoch(trainer, "PruneNetwork prunes", self.epochs[-1])
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError("PruneNetwork does not support averaged weights; remove one of the two callbacks.")
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise UserError(
                "PruneNetwork does not support strategies that fork or spawn processes, because the main process would "
                "keep the unpruned network; set trainer.strategy=ddp."
            )
        if trained_module(pl_module).compiles:
            raise UserError("PruneNetwork does not support a compiled network; set compile=false, or prune it first.")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune a copy, so that errors are raised before the first step."""
        image, layers = self._image(trainer), _layers_read_by_losses(pl_module)
        network = _cpu_copy(trained_module(pl_module).network)
        if self._unpruned_cost is None:
            self._unpruned_cost = cost(network, image, self.measure)
        if len(self._done) == len(self.epochs):
            return
        pruned = select(_cpu_copy(network), self._choose(pl_module, image, self.keep, "magnitude"))
        if layers and not same_features(network, pruned, image, layers):
            raise UserError(
                f"Pruning would change the width of {', '.join(layers)}, which losses read; choose other layers, or "
                "use losses on logits."
            )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Accumulate gradients for ``"taylor"``."""
        if self.importance == "taylor" and trainer.current_epoch + 1 in self.epochs:
            for name, weight in trained_module(pl_module).network.named_parameters():
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad.detach()
                total = self._gradients.get(name)
                self._gradients[name] = gradient.clone() if total is None else total.to(gradient.device) + gradient

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune at the start of an epoch of ``epochs``."""
        epoch = trainer.current_epoch
        if epoch not in self.epochs or epoch in self._done:
            return
        self._done.append(epoch)
        steps = self.epochs.index(epoch) + 1
        keep = 1 - (1 - self.keep) * steps / len(self.epochs)
        image, network = self._image(trainer), trained_module(pl_module).network
        kept: dict[str, Tensor] = {}
        if trainer.is_global_zero:
            kept = self._choose(pl_module, image, keep, self.importance)
        kept = trainer.strategy.broadcast(kept)
        before = _macs_and_parameters(network, image)
        old = dict(network.named_parameters())
        select(network, kept)
        _replace_weights(trainer.optimizers, old, dict(network.named_parameters()), kept)
        self._gradients = {}
        rewrap(trainer.strategy)
        reset_best(trainer)
        after = _macs_and_parameters(network, image)
        rank_zero_info(
            f"Pruned in epoch {epoch}: {before[0]:,.0f} to {after[0]:,.0f} MACs, "
            f"{before[1]:,.0f} to {after[1]:,.0f} parameters."
        )
        for logger in trainer.loggers:
            logger.log_metrics({"prune/macs": after[0], "prune/parameters": after[1]}, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Return the pruned epochs, the cost of the unpruned network and the gradients, for a resumed run."""
        return {"done": list(self._done), "whole": self._unpruned_cost, "gradients": dict(self._gradients)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._done, self._unpruned_cost = list(state_dict["done"]), state_dict["whole"]
        self._gradients = dict(state_dict["gradients"])

    def _choose(
        self, pl_module: pl.LightningModule, image: Tensor, keep: float, importance: Importance
    ) -> dict[str, Tensor]:
        assert self._unpruned_cost is not None
        gradients = self._gradients if importance == "taylor" else None
        layers = _layers_read_by_losses(pl_module)
        return channels_to_keep(
            trained_module(pl_module).network,
            image,
            budget=keep * self._unpruned_cost,
            measure=self.measure,
            importance=importance,
            layers=layers,
            gradients=gradients,
            round_to=self.round_to,
        )

    @staticmethod
    def _image(trainer: pl.Trainer) -> Tensor:
        shape = getattr(trainer.datamodule, "image_shape", None)  # type: ignore[attr-defined]
        if shape is None:
            raise UserError(
                "PruneNetwork needs the size of an image; use a data module with an image_shape (channels, height, "
                "width)."
            )
        return torch.zeros(1, *shape)


def _layers_read_by_losses(pl_module: pl.LightningModule) -> list[str]:
    """Return the layers of the trained network that losses read."""
    losses = getattr(pl_module, "losses", None)
    return list(losses.layers) if isinstance(losses, Objective) else []


def _cpu_copy(network: nn.Module) -> nn.Module:
    return copy_network(network).cpu().float().eval()


def _macs_and_parameters(network: nn.Module, image: Tensor) -> tuple[float, float]:
    copied = _cpu_copy(network)
    return cost(copied, image, "macs"), cost(copied, image, "parameters")


def _replace_weights(
    optimizers: list[Optimizer], old: dict[str, nn.Parameter], new: dict[str, nn.Parameter], kept: dict[str, Tensor]
) -> None:
    """Replace weights in optimizers, and keep the state of the entries that remain."""
    names = {weight: name for name, weight in old.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new[names[weight]] if weight in names else weight for weight in group["params"]]
        for weight, name in names.items():
            if weight is new[name] or weight not in optimizer.state:
                continue
            state = optimizer.state.pop(weight)
            optimizer.state[new[name]] = {
                key: select_entries(value, kept[name])
                if isinstance(value, Tensor) and value.shape == weight.shape
                else value
                for key, value in state.items()
            }
