"""Optimizers, and what a module hands to Lightning."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerConfig, OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import SGD, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LambdaLR

from kd_lightning.errors import UserError, first_line
from kd_lightning.modules.parameter_groups import (
    ParameterGroups,
    layerwise_decay_groups,
    parameter_groups,
    undecayed_by_request,
)
from kd_lightning.modules.schedule import SchedulerFactory, build_scheduler, one_cycle

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


@dataclass(frozen=True)
class Optimization:
    """The optimizer and the schedule of a module.

    Attributes:
        learning_rate: Peak of the schedule; ``None`` for 0.1, or for the rate of ``optimizer``.
        weight_decay: Weight decay; ``None`` for 5e-4, or for that of ``optimizer``.
        optimizer: Function from parameter groups to an optimizer; ``None`` for SGD with Nesterov momentum 0.9.
        lr_scheduler: Function from an optimizer to a scheduler; ``None`` for one cycle over the steps of the run, or
            for a constant rate where ``optimizer`` is given.
        lr_interval: Unit in which ``lr_scheduler`` advances.
        lr_monitor: Logged metric that a ``ReduceLROnPlateau`` follows.
        layer_decay: Factor between the learning rates of neighbouring parts of the network; 1 for none.

    Raises:
        UserError: If a number is out of range.
    """

    learning_rate: float | None = None
    weight_decay: float | None = None
    optimizer: OptimizerFactory | None = None
    lr_scheduler: SchedulerFactory | None = None
    lr_interval: Literal["step", "epoch"] = "epoch"
    lr_monitor: str = "val/loss"
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise UserError(f"learning_rate must be above 0, got {self.learning_rate}.")
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise UserError(f"weight_decay must be >= 0, got {self.weight_decay}.")
        if not 0 < self.layer_decay <= 1:
            raise UserError(
                f"layer_decay must be in (0, 1], got {self.layer_decay}; 1 gives all layers the same learning rate."
            )

    def configure(
        self, module: nn.Module, network: nn.Module, trainer: pl.Trainer
    ) -> OptimizerConfig | OptimizerLRSchedulerConfig:
        """Return optimizer and scheduler as Lightning's ``configure_optimizers`` does.

        Args:
            module: Module whose parameters are trained, learned parts of losses included.
            network: The network in it, to which ``layer_decay`` applies.
            trainer: Trainer of the run.

        Raises:
            UserError: If no parameter is trainable, or the optimizer or scheduler cannot be used in this run.
        """
        optimizer = self._optimizer(self._groups(module, network), trainer)
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        if self.lr_scheduler is not None:
            scheduler = build_scheduler(
                self.lr_scheduler, optimizer, interval=self.lr_interval, monitor=self.lr_monitor, trainer=trainer
            )
            return {"optimizer": optimizer, "lr_scheduler": scheduler}
        if self.optimizer is not None:
            return {"optimizer": optimizer}
        curve = partial(one_cycle, total_steps=trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, curve), "interval": "step"}}

    def _groups(self, module: nn.Module, network: nn.Module) -> ParameterGroups:
        if self.layer_decay == 1:
            groups = parameter_groups(module.parameters(), undecayed_by_request(module))
        else:
            own = set(network.parameters())
            groups = layerwise_decay_groups(network, self.layer_decay)
            groups += parameter_groups(weight for weight in module.parameters() if weight not in own)
        if not groups:
            raise UserError("All weights are frozen, so nothing would train; set requires_grad for some of them.")
        return groups

    def _optimizer(self, groups: ParameterGroups, trainer: pl.Trainer) -> Optimizer:
        if self.optimizer is not None:
            given = {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
            return build_optimizer(self.optimizer, groups, trainer, **given)
        rate = 0.1 if self.learning_rate is None else self.learning_rate
        decay = 5e-4 if self.weight_decay is None else self.weight_decay
        real = all(weight.is_floating_point() for group in groups for weight in group["params"])
        fused = real and not clips_in_mixed_precision(trainer)  # one kernel for all weights
        return SGD(
            [dict(group) for group in groups], lr=rate, weight_decay=decay, momentum=0.9, nesterov=True, fused=fused
        )


def build_optimizer(
    factory: OptimizerFactory,
    groups: ParameterGroups,
    trainer: pl.Trainer,
    *,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
) -> Optimizer:
    """Build a user's optimizer.

    Args:
        factory: Function from parameter groups to an optimizer.
        groups: Parameter groups.
        trainer: Trainer of the run.
        learning_rate: Learning rate of all groups; ``None`` for the optimizer's own.
        weight_decay: Weight decay of the groups that have none yet; ``None`` for the optimizer's own.

    Raises:
        UserError: If its arguments are invalid, it has another learning rate or weight decay of its own than the one
            given, or it does not work with the gradients of this run.
    """
    given = {"lr": learning_rate, "weight_decay": weight_decay}
    values = {name: value for name, value in given.items() if value is not None}
    try:
        optimizer = factory([{**values, **group} for group in groups])
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"The optimizer cannot be built ({first_line(error)}); correct its arguments.") from error
    name = type(optimizer).__name__
    if isinstance(optimizer, SparseAdam):
        raise UserError(f"{name} only supports sparse gradients, but these are dense; choose AdamW, for example.")
    if optimizer.defaults.get("fused") and clips_in_mixed_precision(trainer):
        raise UserError(
            f"Under mixed precision Lightning cannot clip the gradients of a fused {name}; remove fused=True or "
            "gradient_clip_val."
        )
    for argument, value in values.items():
        _check_argument(optimizer, argument, value)
        optimizer.defaults[argument] = value
    return optimizer


def _check_argument(optimizer: Optimizer, argument: str, value: float) -> None:
    """Raise if an optimizer does not have an argument, or was built with another value than its class's default."""
    name = type(optimizer).__name__
    ours = {"lr": "learning_rate"}.get(argument, argument)
    if argument not in optimizer.defaults:
        raise UserError(f"{name} has no {argument}, so {ours}={value:g} would not be used; leave it out.")
    parameter = signature(type(optimizer)).parameters.get(argument)
    own = optimizer.defaults[argument]
    default = parameter.default if parameter is not None else own
    if own not in (value, default):
        raise UserError(
            f"The optimizer {name} has {argument}={float(own):g} and the module {ours}={value:g}; give one of them."
        )


def clips_in_mixed_precision(trainer: pl.Trainer) -> bool:
    """Return whether gradients are clipped in a precision in which Lightning rejects fused optimizers."""
    return bool(trainer.gradient_clip_val) and "mixed" in str(trainer.precision)


def use_found_rate(trainer: pl.Trainer, learning_rate: float | None) -> None:
    """Build the optimizers of a run again, with their schedules, if they were built with another learning rate.

    Lightning's ``LearningRateFinder`` sets the rate of a module afterwards. Weights that a callback has frozen before
    this are in the new optimizers too.

    Args:
        trainer: Trainer of the run, before the first step.
        learning_rate: The module's learning rate; ``None`` for that of the optimizer.
    """
    if all(learning_rate in (None, optimizer.defaults.get("lr")) for optimizer in trainer.optimizers):
        return
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    frozen = [weight for group in groups for weight in group["params"] if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    trainer.strategy.setup_optimizers(trainer)
    for weight in frozen:
        weight.requires_grad_(False)


def init_momentum_buffers(optimizer: Optimizer) -> None:
    """Give torch's fused SGD zeros, before a step, where a weight has a gradient and no momentum yet.

    The step then sets the momentum to the gradient, as it does without a buffer. The fused kernel itself rejects a
    group in which some weights have a momentum and others, whose first gradient comes later, have none; and if the
    first step is skipped (``found_inf``), it continues with uninitialized memory.
    """
    groups = optimizer.param_groups if isinstance(optimizer, SGD) else []
    if len(optimizer.state) == sum(len(group["params"]) for group in groups):
        return
    for group in groups:
        if group["fused"] and group["momentum"] and not group["dampening"]:
            for weight in group["params"]:
                if weight.grad is not None and optimizer.state[weight].get("momentum_buffer") is None:
                    optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight.grad)
