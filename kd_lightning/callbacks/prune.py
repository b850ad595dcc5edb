"""Structured pruning while a network trains."""

import copy
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
from kd_lightning.callbacks.rewrap import rewrap
from kd_lightning.errors import UserError
from kd_lightning.losses import Objective
from kd_lightning.networks.channel_slicing import select, select_entries


class PruneNetwork(pl.Callback):
    """Removes whole channels of the trained network at the start of epochs; training goes on with what is left.

    The teacher is not touched, nor are the classifier's outputs and the width of layers that a loss reads. The
    optimizer keeps the state of the weights that remain. Checkpoints say how narrow the network is, and every command
    builds it so; the best one is of an epoch after the last pruning. Of several processes the first decides for all.

    Args:
        keep: The share of the cost that remains in the end, in (0, 1).
        measure: The cost: ``"macs"`` (multiply-accumulates of one image), ``"parameters"``, or ``"latency"`` (measured
            at batch 1 on the CPU; not the same in every run).
        importance: By what channels are chosen, over all layers together: ``"magnitude"`` of weights, ``"bn_scale"``,
            or ``"taylor"``, weights times the gradients of the epoch before.
        epochs: In which epochs, counted from 0; of n, each takes an n-th of what goes.
        round_to: Widths are multiples of it where that is possible.

    Raises:
        ValueError: If an argument lies outside its range; in ``fit``, before the first step, if the network cannot be
            traced or become so small, or is compiled or averaged, or if the training ends before the last of epochs.

    Example:
        >>> prune = PruneNetwork(keep=0.5, epochs=[2, 4, 6])
    """

    def __init__(
        self,
        keep: float = 0.5,
        measure: Measure = "macs",
        importance: Importance = "magnitude",
        epochs: Sequence[int] = (0,),
        round_to: int = 1,
    ) -> None:
        if not 0 < keep < 1:
            raise UserError(f"keep, the share that remains, must lie between 0 and 1, got {keep}.")
        if not epochs or min(epochs) < 0 or len(set(epochs)) < len(epochs):
            raise UserError(f"epochs must be one or several different numbers >= 0, got {list(epochs)}.")
        if round_to < 1:
            raise UserError(f"round_to must be >= 1, got {round_to}.")
        if importance == "taylor" and min(epochs) == 0:
            raise UserError("taylor needs the gradients of the epoch before; let the first of epochs be 1 or more.")
        torch_pruning()
        self.keep = keep
        self.measure: Measure = measure
        self.importance: Importance = importance
        self.epochs = sorted(epochs)
        self.round_to = round_to
        self._done: list[int] = []
        self._whole: float | None = None
        self._gradients: dict[str, Tensor] = {}

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse what cannot be pruned."""
        if stage != "fit":
            return
        check_epoch(trainer, "PruneNetwork prunes", self.epochs[-1])
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError("PruneNetwork and averaged weights do not go together; leave one of them out.")
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise UserError(
                "The process that starts others by fork or spawn does not learn what they prune; set "
                "trainer.strategy=ddp."
            )
        if pl_module.compiles:
            raise UserError("A compiled network cannot be pruned; set compile=false, or prune it first.")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Try it on a copy, before the first step."""
        image, layers = self._image(trainer), _read(pl_module)
        network = _copied(pl_module.network)
        if self._whole is None:
            self._whole = cost(network, image, self.measure)
        if len(self._done) == len(self.epochs):
            return
        pruned = select(_copied(network), self._choose(pl_module, image, self.keep, "magnitude"))
        if layers and not same_features(network, pruned, image, layers):
            raise UserError(
                f"Pruning would change the width of {', '.join(layers)}, which losses read; read other layers, or use "
                "losses on logits."
            )

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Sum up gradients for ``"taylor"``."""
        if self.importance == "taylor" and trainer.current_epoch + 1 in self.epochs:
            for name, weight in pl_module.network.named_parameters():
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad.detach()
                seen = self._gradients.get(name)
                self._gradients[name] = gradient.clone() if seen is None else seen.to(gradient.device) + gradient

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Prune, if it is time."""
        epoch = trainer.current_epoch
        if epoch not in self.epochs or epoch in self._done:
            return
        self._done.append(epoch)
        steps = self.epochs.index(epoch) + 1
        keep = 1 - (1 - self.keep) * steps / len(self.epochs)
        image, network = self._image(trainer), pl_module.network
        kept: dict[str, Tensor] = {}
        if trainer.is_global_zero:
            kept = self._choose(pl_module, image, keep, self.importance)
        kept = trainer.strategy.broadcast(kept)
        before = _figures(network, image)
        old = dict(network.named_parameters())
        select(network, kept)
        _repair(trainer.optimizers, old, dict(network.named_parameters()), kept)
        self._gradients = {}
        rewrap(trainer.strategy)
        reset_best(trainer)
        after = _figures(network, image)
        rank_zero_info(
            f"Pruned in epoch {epoch}: {before[0]:,.0f} to {after[0]:,.0f} MACs, "
            f"{before[1]:,.0f} to {after[1]:,.0f} parameters."
        )
        for logger in trainer.loggers:
            logger.log_metrics({"prune/macs": after[0], "prune/parameters": after[1]}, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """What was pruned, and what is known for the next time."""
        return {"done": list(self._done), "whole": self._whole, "gradients": dict(self._gradients)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self._done, self._whole = list(state_dict["done"]), state_dict["whole"]
        self._gradients = dict(state_dict["gradients"])

    def _choose(self, pl_module: Any, image: Tensor, keep: float, importance: Importance) -> dict[str, Tensor]:
        assert self._whole is not None
        gradients = self._gradients if importance == "taylor" else None
        layers = _read(pl_module)
        return channels_to_keep(
            pl_module.network, image, keep * self._whole, self.measure, importance, layers, gradients, self.round_to
        )

    @staticmethod
    def _image(trainer: pl.Trainer) -> Tensor:
        shape = getattr(trainer.datamodule, "image_shape", None)  # type: ignore[attr-defined]
        if shape is None:
            raise UserError("The data module must tell its image_shape (channels, height, width) for pruning.")
        return torch.zeros(1, *shape)


def _read(pl_module: Any) -> list[str]:
    """Return the layers of the trained network that losses read."""
    return list(pl_module.losses.layers) if isinstance(getattr(pl_module, "losses", None), Objective) else []


def _copied(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).cpu().float().eval()


def _figures(network: nn.Module, image: Tensor) -> tuple[float, float]:
    alone = _copied(network)
    return cost(alone, image, "macs"), cost(alone, image, "parameters")


def _repair(
    optimizers: list[Optimizer], old: dict[str, nn.Parameter], new: dict[str, nn.Parameter], kept: dict[str, Tensor]
) -> None:
    """Have optimizers train the new weights, with what they know of them."""
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
