"""Layers that stay as they are for some epochs, or for ever."""

import math
from typing import Any

import lightning.pytorch as pl
from torch import nn

from kd_lightning.callbacks.rewrap import rewrap
from kd_lightning.errors import UserError
from kd_lightning.networks.head import head_of


class FreezeLayers(pl.Callback):
    """Keeps layers of the trained network as they are, until an epoch or for ever.

    A frozen layer gets no update, no weight decay and no state in the optimizer, and it is in eval mode: its batch
    norms use the statistics that they have and keep them, its dropout is off. Its weights are in the optimizer from
    the start, so that a layer that thaws follows the same schedule as all others. What is frozen depends on the epoch
    alone, so a run that goes on from a checkpoint needs nothing in it. Weights that did not train before
    (``requires_grad=False``) never do, and after the fit the network trains as it did before.

    Args:
        layers: Names as in ``named_modules()`` of the network (``kd-lightning layers`` prints them), or of single
            weights; with a layer goes all that is in it. By default everything but the last ``nn.Linear``.
        until_epoch: The first epoch (they count from 0) in which they train; ``None`` for never. Or several groups with
            an epoch each, ``{"layer1": null, "layer2": 4, "layer3": 2}``, instead of ``layers``; of several names that
            fit a weight the longest decides.

    Raises:
        ValueError: If an epoch is negative or no layer is named; in ``fit``, before the first step, if the network has
            no such layer or nothing is left to train.

    Example:
        >>> freeze = FreezeLayers(until_epoch={"conv1": None, "layer1": None, "layer2": 4, "layer3": 2})
        >>> head_first = FreezeLayers(until_epoch=3)
    """

    def __init__(self, layers: list[str] | None = None, until_epoch: int | dict[str, int | None] | None = None) -> None:
        if isinstance(until_epoch, dict) and layers is not None:
            raise UserError(
                "Give either layers and one until_epoch, or until_epoch with a name for each epoch; not both."
            )
        groups: dict[str, int | None] | None = None
        if isinstance(until_epoch, dict):
            groups = until_epoch
        elif layers is not None:
            groups = dict.fromkeys(layers, until_epoch)
        epochs = [until_epoch] if groups is None else list(groups.values())
        if not epochs:
            raise UserError("FreezeLayers got no layer to freeze; name one, or leave layers out for all but the head.")
        if any(isinstance(epoch, int) and epoch < 0 for epoch in epochs):
            raise UserError(f"until_epoch must be >= 0, or null for ever, got {until_epoch}.")
        self.groups = groups
        self.until_epoch = until_epoch
        self._weights: list[tuple[nn.Parameter, float]] = []
        self._layers: list[tuple[nn.Module, float]] = []
        self._resting: list[nn.Module] = []
        self._epoch = -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze, now that the optimizer has all weights."""
        network: Any = pl_module.network
        until = self._until(network)
        trained = [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]
        self._weights = [(weight, _of(name, until)) for name, weight in trained]
        # what is in eval mode by its owner's wish is left so
        self._layers = [(layer, _of(name, until)) for name, layer in network.named_modules() if layer.training]
        if all(until > trainer.current_epoch for _, until in self._weights):
            raise UserError(
                f"FreezeLayers leaves nothing of {type(network).__name__} to train in epoch {trainer.current_epoch}; "
                "freeze fewer layers, or until an earlier epoch."
            )
        self._turn_to(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Thaw what trains from this epoch on; an epoch that goes on has no other start than that of a batch."""
        if trainer.current_epoch != self._epoch:
            self._turn_to(trainer)
        for layer in self._resting:  # whatever called train() on all of it
            layer.training = False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the network as it was."""
        for weight, _ in self._weights:
            weight.requires_grad_(True)
        for layer in self._resting:
            layer.training = True
        self._weights, self._layers, self._resting = [], [], []

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the network as it was."""
        self.teardown(trainer, pl_module, "fit")

    def _turn_to(self, trainer: pl.Trainer) -> None:
        self._epoch = trainer.current_epoch
        changed = [weight for weight, until in self._weights if weight.requires_grad != (until <= self._epoch)]
        for weight in changed:
            weight.requires_grad_(not weight.requires_grad)
        for layer in self._resting:
            layer.training = True
        self._resting = [
            layer
            for layer, until in self._layers
            if until > self._epoch and not any(weight.requires_grad for weight in layer.parameters())
        ]
        if changed:
            rewrap(trainer.strategy)

    def _until(self, network: nn.Module) -> dict[str, float]:
        """The epoch until which each group is frozen, by the name that its weights begin with."""
        if self.groups is None:
            head = head_of(network)
            if head is None:
                raise UserError(
                    f"{type(network).__name__} has no linear layer that would be its head; name the layers to freeze."
                )
            return {"": _epoch(self.until_epoch), head[0]: 0}
        layers = [name for name, _ in network.named_modules() if name]
        known = {*layers, *(name for name, _ in network.named_parameters())}
        missing = [name for name in self.groups if name not in known]
        if missing:
            raise UserError(
                f"{type(network).__name__} has no layer {', '.join(map(repr, missing))} to freeze; choose from: "
                f"{', '.join(layers)}."
            )
        return {name: _epoch(epoch) for name, epoch in self.groups.items()}


def _epoch(until: Any) -> float:
    return math.inf if until is None else until


def _of(name: str, until: dict[str, float]) -> float:
    fitting = [group for group in until if not group or name == group or name.startswith(f"{group}.")]
    return until[max(fitting, key=len)] if fitting else 0
