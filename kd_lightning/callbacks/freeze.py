"""Freezes layers for some epochs or for the whole training."""

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from torch import nn

from kd_lightning.callbacks.protocol import trained_module
from kd_lightning.callbacks.rewrap import rewrap
from kd_lightning.errors import UserError
from kd_lightning.networks.output_layers import output_weights


class FreezeLayers(pl.Callback):
    """Freezes layers of the trained network until an epoch, or for the whole training.

    A frozen layer has no update, no weight decay and no state in the optimizer, and it is in eval mode: its batch norms
    use and keep their statistics, and its dropout is off. Its weights are in the optimizer from the start, so a layer
    that is unfrozen later follows the same schedule as all others. The epoch determines what is frozen, so a resumed
    run needs no saved state. Weights that did not train before (``requires_grad=False``) never do, and after the fit
    the network is as trainable as before.

    Args:
        layers: Names of layers as in ``named_modules()`` of the network (``kd-lightning layers`` prints them), each
            with everything in it, or of single weights; by default everything but what computes the logits: usually
            the last linear layer, or all heads of a network that has several.
        until_epoch: The first epoch, counted from 0, in which the layers train; ``None`` for never. Several groups with
            an epoch each, ``{"layer1": null, "layer2": 4, "layer3": 2}``, replace ``layers``; if several names match a
            weight, the longest is used.

    Raises:
        UserError: If an epoch is negative or no layer is named; in ``fit``, before the first step, if the network does
            not have such a layer or nothing is left to train.

    Example:
        >>> freeze = FreezeLayers(until_epoch={"conv1": None, "layer1": None, "layer2": 4, "layer3": 2})
        >>> head_first = FreezeLayers(until_epoch=3)
    """

    def __init__(
        self, layers: list[str] | None = None, *, until_epoch: int | dict[str, int | None] | None = None
    ) -> None:
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
            raise UserError("FreezeLayers got no layer to freeze; name one, or omit layers to freeze all but the head.")
        if any(isinstance(epoch, int) and epoch < 0 for epoch in epochs):
            raise UserError(f"until_epoch must be >= 0, or null for the whole training, got {until_epoch}.")
        self.groups = groups
        self._common_epoch = None if isinstance(until_epoch, dict) else until_epoch
        self._weights: list[tuple[nn.Parameter, float]] = []
        self._layers: list[tuple[nn.Module, float]] = []
        self._in_eval: list[nn.Module] = []
        self._epoch = -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze the layers of the current epoch, after the optimizer got all weights."""
        network = trained_module(pl_module).network
        until = self._until(network, getattr(pl_module, "image_shape", None))
        trained = [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]
        self._weights = [(weight, _until_of(name, until)) for name, weight in trained]
        # a layer that the user has put into eval mode stays in it
        self._layers = [(layer, _until_of(name, until)) for name, layer in network.named_modules() if layer.training]
        if all(until > trainer.current_epoch for _, until in self._weights):
            raise UserError(
                f"FreezeLayers leaves nothing of {type(network).__name__} to train in epoch {trainer.current_epoch}; "
                "freeze fewer layers, or until an earlier epoch."
            )
        self._set_epoch(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Unfreeze what trains from this epoch on; a resumed epoch has no other hook at its start."""
        if trainer.current_epoch != self._epoch:
            self._set_epoch(trainer)
        for layer in self._in_eval:  # Lightning may have called train() on the whole network
            layer.training = False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore what trained before the fit."""
        for weight, _ in self._weights:
            weight.requires_grad_(True)
        for layer in self._in_eval:
            layer.training = True
        self._weights, self._layers, self._in_eval = [], [], []

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore what trained before the fit."""
        self.teardown(trainer, pl_module, "fit")

    def _set_epoch(self, trainer: pl.Trainer) -> None:
        self._epoch = trainer.current_epoch
        changed = [weight for weight, until in self._weights if weight.requires_grad != (until <= self._epoch)]
        for weight in changed:
            weight.requires_grad_(not weight.requires_grad)
        for layer in self._in_eval:
            layer.training = True
        self._in_eval = [
            layer
            for layer, until in self._layers
            if until > self._epoch and not any(weight.requires_grad for weight in layer.parameters())
        ]
        if changed:
            rewrap(trainer.strategy)

    def _until(self, network: nn.Module, image_shape: Sequence[int] | None) -> dict[str, float]:
        """Return for each prefix of weight names the epoch until which these weights are frozen."""
        if self.groups is None:
            head = output_weights(network, image_shape)
            if not head:
                raise UserError(
                    f"The weights that compute the logits of {type(network).__name__} were not found; name the layers "
                    "to freeze."
                )
            if set(head) >= {name for name, weight in network.named_parameters() if weight.requires_grad}:
                raise UserError(
                    f"All weights of {type(network).__name__} compute its logits, so nothing would be frozen; "
                    "name the layers to freeze."
                )
            return {"": _epoch(self._common_epoch), **dict.fromkeys(head, 0.0)}
        layers = [name for name, _ in network.named_modules() if name]
        known = {*layers, *(name for name, _ in network.named_parameters())}
        missing = [name for name in self.groups if name not in known]
        if missing:
            raise UserError(
                f"{type(network).__name__} has no layer {', '.join(map(repr, missing))} to freeze; choose from: "
                f"{', '.join(layers)}."
            )
        return {name: _epoch(epoch) for name, epoch in self.groups.items()}


def _epoch(until: int | None) -> float:
    return math.inf if until is None else until


def _until_of(name: str, until: dict[str, float]) -> float:
    matching = [group for group in until if not group or name == group or name.startswith(f"{group}.")]
    return until[max(matching, key=len)] if matching else 0
