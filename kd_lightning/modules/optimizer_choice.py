"""Optimizers and schedulers of a user's choice, refused before the first step where they cannot work."""

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion
from torch.optim import Optimizer, SparseAdam
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kd_lightning.errors import UserError

Made = TypeVar("Made")


def build_optimizer(
    factory: Callable[[Any], Optimizer], groups: list[dict[str, Any]], trainer: pl.Trainer
) -> Optimizer:
    """An optimizer of groups of weights.

    Raises:
        ValueError: If its arguments are refused, or it cannot take the gradients of this run.
    """
    optimizer = _made("optimizer", factory, groups)
    name = type(optimizer).__name__
    if isinstance(optimizer, SparseAdam):
        raise UserError(f"{name} takes sparse gradients alone, and those here are dense; choose AdamW, for example.")
    if optimizer.defaults.get("fused") and unclippable(trainer):
        raise UserError(
            f"Under mixed precision Lightning clips no gradients of a fused {name}; leave out fused=True or "
            "gradient_clip_val."
        )
    return optimizer


def unclippable(trainer: pl.Trainer) -> bool:
    """Whether gradients are clipped in a precision in which Lightning refuses to clip those of a fused optimizer."""
    return bool(trainer.gradient_clip_val) and "mixed" in str(trainer.precision)


def build_scheduler(
    factory: Callable[[Optimizer], LRSchedulerTypeUnion],
    optimizer: Optimizer,
    interval: Literal["step", "epoch"],
    trainer: pl.Trainer,
) -> dict[str, Any]:
    """A scheduler as Lightning takes it; one that follows a figure follows ``val/loss``.

    Raises:
        ValueError: If its arguments are refused, or it would end before the run does, or could not follow.
    """
    _made("lr_scheduler", partial(_dry_step, factory), optimizer)
    scheduler = factory(optimizer)
    name = type(scheduler).__name__
    every = 1
    if isinstance(scheduler, ReduceLROnPlateau):
        if interval == "step" or not trainer.limit_val_batches:
            raise UserError(
                f"{name} follows val/loss, which is known once an epoch; set lr_interval='epoch' and keep the "
                "validation."
            )
        every = trainer.check_val_every_n_epoch or 1
    ends = getattr(scheduler, "total_steps", math.inf)
    if ends < math.inf and (moves := _moves(interval, trainer)) > ends:
        raise UserError(f"{name} ends after {ends} {interval}s and the run after {moves}; set total_steps to as many.")
    return {"scheduler": scheduler, "interval": interval, "frequency": every, "monitor": "val/loss"}


def _dry_step(factory: Callable[[Optimizer], LRSchedulerTypeUnion], optimizer: Optimizer) -> None:
    """Some arguments (a step_size of 0) fail at the first move only; a copy of the optimizer's settings is moved."""
    trial = copy.copy(optimizer)
    trial.param_groups = [dict(group) for group in optimizer.param_groups]
    scheduler: Any = factory(trial)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch misses a step of the optimizer before
        scheduler.step(*[0.0] * isinstance(scheduler, ReduceLROnPlateau))


def _moves(interval: Literal["step", "epoch"], trainer: pl.Trainer) -> float:
    if interval == "step":
        return trainer.estimated_stepping_batches
    return trainer.max_epochs if trainer.max_epochs and trainer.max_steps == -1 else 0


def _made(what: str, factory: Callable[[Any], Made], of: Any) -> Made:
    try:
        return factory(of)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"The {what} cannot be made ({reason}); mend its arguments.") from error
