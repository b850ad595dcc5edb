"""Parameter groups, optimizers and learning rate schedules."""

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion
from torch import nn
from torch.optim import SGD, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from kd_lightning.errors import UserError, first_line

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRSchedulerTypeUnion]
Built = TypeVar("Built")


@dataclass(frozen=True)
class Optimization:
    """The optimizer and the schedule of a module.

    Attributes:
        learning_rate: Peak of the default schedule.
        weight_decay: Weight decay of the default optimizer.
        optimizer: Function from parameter groups to an optimizer; ``None`` for SGD with Nesterov momentum 0.9.
        lr_scheduler: Function from an optimizer to a scheduler; ``None`` for one cycle over the steps of the run, or
            for a constant rate where ``optimizer`` is given.
        lr_interval: Unit in which ``lr_scheduler`` advances.
        layer_decay: Factor between the learning rates of neighbouring children of the network; 1 for none.

    Raises:
        UserError: If a number is out of range.
    """

    learning_rate: float
    weight_decay: float
    optimizer: OptimizerFactory | None
    lr_scheduler: SchedulerFactory | None
    lr_interval: Literal["step", "epoch"]
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise UserError(
                "learning_rate must be above 0 and weight_decay >= 0, got "
                f"{self.learning_rate} and {self.weight_decay}."
            )
        if not 0 < self.layer_decay <= 1:
            raise UserError(
                f"layer_decay must be in (0, 1], got {self.layer_decay}; 1 gives all layers the same learning rate."
            )

    def configure(self, module: nn.Module, network: nn.Module, trainer: pl.Trainer) -> dict[str, Any]:
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
            scheduler = build_scheduler(self.lr_scheduler, optimizer, self.lr_interval, trainer)
            return {"optimizer": optimizer, "lr_scheduler": scheduler}
        if self.optimizer is not None:
            return {"optimizer": optimizer}
        curve = partial(one_cycle, total_steps=trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, curve), "interval": "step"}}

    def _groups(self, module: nn.Module, network: nn.Module) -> list[dict[str, Any]]:
        if self.layer_decay == 1:
            groups = parameter_groups(module.parameters())
        else:
            own = set(network.parameters())
            groups = layerwise_decay_groups(network, self.layer_decay)
            groups += parameter_groups(weight for weight in module.parameters() if weight not in own)
        if not groups:
            raise UserError("All weights are frozen, so nothing would train; set requires_grad for some of them.")
        return groups

    def _optimizer(self, groups: list[dict[str, Any]], trainer: pl.Trainer) -> Optimizer:
        if self.optimizer is not None:
            return build_optimizer(self.optimizer, groups, trainer)
        fused = not clips_in_mixed_precision(trainer)  # one kernel for all weights
        options: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": self.weight_decay}
        return SGD(groups, lr=self.learning_rate, fused=fused, **options)


def parameter_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Return two groups, so that weight decay leaves out norms and biases (fewer than two dimensions).

    Example:
        >>> [len(group["params"]) for group in parameter_groups(nn.Linear(2, 3).parameters())]
        [1, 1]
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1]},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def layerwise_decay_groups(network: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
    """Return groups as :func:`parameter_groups` does, in which earlier parts of the network learn more slowly.

    The last direct child with trainable weights has ``"lr_scale"`` 1, each one before it ``layer_decay`` times that of
    the next; weights outside of all children have that of the first child.

    Example:
        >>> groups = layerwise_decay_groups(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), 0.5)
        >>> [group["lr_scale"] for group in groups]
        [1.0, 1.0, 0.5, 0.5]
    """
    parts = [part for part in network.children() if any(weight.requires_grad for weight in part.parameters())]
    groups, seen, scale = [], set[nn.Parameter](), 1.0
    for part in reversed(parts):
        new = [weight for weight in part.parameters() if weight not in seen]
        seen.update(new)
        groups += [{**group, "lr_scale": scale} for group in parameter_groups(new)]
        scale *= layer_decay
    outside = [weight for weight in network.parameters() if weight not in seen]
    return groups + [{**group, "lr_scale": scale / layer_decay} for group in parameter_groups(outside)]


def build_optimizer(factory: OptimizerFactory, groups: list[dict[str, Any]], trainer: pl.Trainer) -> Optimizer:
    """Build a user's optimizer.

    Args:
        factory: Function from parameter groups to an optimizer.
        groups: Parameter groups.
        trainer: Trainer of the run.

    Raises:
        UserError: If its arguments are invalid, or it does not work with the gradients of this run.
    """
    optimizer = _build("optimizer", factory, groups)
    name = type(optimizer).__name__
    if isinstance(optimizer, SparseAdam):
        raise UserError(f"{name} only supports sparse gradients, but these are dense; choose AdamW, for example.")
    if optimizer.defaults.get("fused") and clips_in_mixed_precision(trainer):
        raise UserError(
            f"Under mixed precision Lightning cannot clip the gradients of a fused {name}; remove fused=True or "
            "gradient_clip_val."
        )
    return optimizer


def clips_in_mixed_precision(trainer: pl.Trainer) -> bool:
    """Return whether gradients are clipped in a precision in which Lightning rejects fused optimizers."""
    return bool(trainer.gradient_clip_val) and "mixed" in str(trainer.precision)


def build_scheduler(
    factory: SchedulerFactory, optimizer: Optimizer, interval: Literal["step", "epoch"], trainer: pl.Trainer
) -> dict[str, Any]:
    """Build a user's scheduler, as Lightning expects it; one that monitors a metric monitors ``val/loss``.

    Args:
        factory: Function from an optimizer to a scheduler.
        optimizer: Optimizer of the run.
        interval: Unit in which the scheduler advances.
        trainer: Trainer of the run.

    Raises:
        UserError: If its arguments are invalid, it would end before the run, or its metric is not available.
    """
    _build("lr_scheduler", partial(_dry_step, factory), optimizer)
    scheduler = factory(optimizer)
    name, frequency = type(scheduler).__name__, 1
    if isinstance(scheduler, ReduceLROnPlateau):
        if interval == "step" or not trainer.limit_val_batches:
            raise UserError(
                f"{name} monitors val/loss, which is computed once an epoch; set lr_interval='epoch' and keep the "
                "validation."
            )
        frequency = trainer.check_val_every_n_epoch or 1
    end = getattr(scheduler, "total_steps", math.inf)
    if end < math.inf and (steps := _scheduler_steps(interval, trainer)) > end:
        raise UserError(f"{name} ends after {end} {interval}s but the run after {steps}; set total_steps to {steps}.")
    return {"scheduler": scheduler, "interval": interval, "frequency": frequency, "monitor": "val/loss"}


def _dry_step(factory: SchedulerFactory, optimizer: Optimizer) -> None:
    """Step a scheduler of a copy of the optimizer's settings: some arguments (a step_size of 0) only fail then."""
    trial = copy.copy(optimizer)
    trial.param_groups = [dict(group) for group in optimizer.param_groups]
    scheduler: Any = factory(trial)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch misses a step of the optimizer before
        scheduler.step(*[0.0] * isinstance(scheduler, ReduceLROnPlateau))


def _scheduler_steps(interval: Literal["step", "epoch"], trainer: pl.Trainer) -> float:
    if interval == "step":
        return trainer.estimated_stepping_batches
    return trainer.max_epochs if trainer.max_epochs and trainer.max_steps == -1 else 0


def _build(kind: str, factory: Callable[[Any], Built], argument: Any) -> Built:
    try:
        return factory(argument)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"The {kind} cannot be built ({first_line(error)}); correct its arguments.") from error


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


def one_cycle(step: int, total_steps: float, rise: float = 0.3) -> float:
    """Return the factor of the peak learning rate: a cosine from 1/25 up to 1, then one down to 4e-6.

    The curve of ``torch.optim.lr_scheduler.OneCycleLR`` with its defaults, but as a pure function: a run that is
    resumed with more epochs follows the longer curve. Constant where the number of steps is unknown.

    L. N. Smith, N. Topin: Super-Convergence, 2018, https://arxiv.org/abs/1708.07120

    Args:
        step: Number of optimizer steps done.
        total_steps: Number of optimizer steps of the run, or infinity.
        rise: Fraction of the steps during which the rate rises.

    Example:
        >>> [round(one_cycle(step, 10), 3) for step in (0, 2, 9)]
        [0.04, 1.0, 0.0]
    """
    if math.isinf(total_steps) or total_steps < 4:
        return 1.0
    top, end = max(rise * total_steps - 1, 1), total_steps - 1
    if step <= top:
        return _cosine(1 / 25, 1.0, step / top)
    return _cosine(1.0, 4e-6, min((step - top) / (end - top), 1.0))


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2
