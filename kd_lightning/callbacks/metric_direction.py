"""Which metrics are better when they are higher, and callbacks that assume the opposite."""

from collections.abc import Iterable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from kd_lightning.errors import UserError

_HIGHER = {"accuracy", "top5", "agreement", "mutual_information", "criterion", "map", "f1_micro", "f1_macro"}
_LOWER = {"loss", "ece", "kl"}


def check_mode(name: str, monitor: str, mode: str, argument: str = "monitor") -> None:
    """Raise if a mode contradicts the metric that it is for; metrics that this package does not log pass.

    Args:
        name: Class that monitors the metric.
        monitor: Name of the metric as it is logged, for example ``"val/accuracy"``.
        mode: ``"min"`` or ``"max"``.
        argument: Name of the argument that sets the metric.

    Raises:
        UserError: If ``mode`` is not the direction in which the metric improves.

    Example:
        >>> check_mode("EarlyStopping", "val/accuracy", "max")
        >>> check_mode("EarlyStopping", "val/accuracy", "min")
        Traceback (most recent call last):
        kd_lightning.errors.UserError: EarlyStopping has mode='min', but val/accuracy improves as it rises; set mode='max', or monitor to a metric that improves as it falls.
    """  # noqa: E501
    metric = monitor.rpartition("/")[2]
    if metric not in (_HIGHER if mode == "min" else _LOWER):
        return
    better, worse, right = ("rises", "falls", "max") if mode == "min" else ("falls", "rises", "min")
    raise UserError(
        f"{name} has mode={mode!r}, but {monitor} improves as it {better}; set mode={right!r}, or {argument} to a "
        f"metric that improves as it {worse}."
    )


def check_modes(callbacks: Iterable[pl.Callback]) -> None:
    """Raise if an ``EarlyStopping`` or ``ModelCheckpoint`` would take the worst epoch for the best one.

    Raises:
        UserError: If a mode contradicts its metric.
    """
    for callback in callbacks:
        if isinstance(callback, EarlyStopping | ModelCheckpoint) and callback.monitor is not None:
            check_mode(type(callback).__name__, callback.monitor, callback.mode)
