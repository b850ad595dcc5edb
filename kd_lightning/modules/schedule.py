"""Learning rate schedules."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import LRSchedulerConfigType, LRSchedulerTypeUnion
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kd_lightning.callbacks.metric_direction import check_mode
from kd_lightning.errors import UserError, first_line

SchedulerFactory = Callable[[Optimizer], LRSchedulerTypeUnion]


def build_scheduler(
    factory: SchedulerFactory,
    optimizer: Optimizer,
    *,
    interval: Literal["step", "epoch"],
    monitor: str,
    trainer: pl.Trainer,
) -> LRSchedulerConfigType:
    """Build a user's scheduler, as Lightning expects it.

    Args:
        factory: Function from an optimizer to a scheduler.
        optimizer: Optimizer of the run.
        interval: Unit in which the scheduler advances.
        monitor: Logged metric that a ``ReduceLROnPlateau`` follows.
        trainer: Trainer of the run.

    Raises:
        UserError: If its arguments are invalid, it would end before the run, its metric is not available, or its mode
            contradicts the metric.
    """
    try:
        _dry_step(factory, optimizer)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"The lr_scheduler cannot be built ({first_line(error)}); correct its arguments.") from error
    scheduler = factory(optimizer)
    name, frequency = type(scheduler).__name__, 1
    if isinstance(scheduler, ReduceLROnPlateau):
        check_mode(name, monitor, scheduler.mode, "lr_monitor")
        if interval == "step" or not trainer.limit_val_batches:
            raise UserError(
                f"{name} monitors {monitor}, which is computed once an epoch; set lr_interval='epoch' and keep the "
                "validation."
            )
        frequency = trainer.check_val_every_n_epoch or 1
    end = getattr(scheduler, "total_steps", math.inf)
    if end < math.inf and (steps := _scheduler_steps(interval, trainer)) > end:
        raise UserError(f"{name} ends after {end} {interval}s but the run after {steps}; set total_steps to {steps}.")
    return {"scheduler": scheduler, "interval": interval, "frequency": frequency, "monitor": monitor}


def _dry_step(factory: SchedulerFactory, optimizer: Optimizer) -> None:
    """Step a scheduler of a copy of the optimizer's settings: some arguments (a step_size of 0) only fail then."""
    trial = copy.copy(optimizer)
    trial.param_groups = [dict(group) for group in optimizer.param_groups]
    scheduler = factory(trial)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch misses a step of the optimizer before
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(0.0)
        else:
            scheduler.step()


def _scheduler_steps(interval: Literal["step", "epoch"], trainer: pl.Trainer) -> float:
    if interval == "step":
        return trainer.estimated_stepping_batches
    return trainer.max_epochs if trainer.max_epochs and trainer.max_steps == -1 else 0


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
