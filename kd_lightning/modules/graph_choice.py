"""Which runs can take their training steps by a CUDA graph."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from kd_lightning.callbacks.finite_guard import FiniteGuard, supports_found_inf
from kd_lightning.callbacks.mask import MaskWeights
from kd_lightning.callbacks.prune import PruneNetwork
from kd_lightning.callbacks.quantize import QuantizationAwareTraining
from kd_lightning.losses.base import Term

_CHANGES_STEP = MaskWeights, PruneNetwork, QuantizationAwareTraining, GradientAccumulationScheduler
"""Callbacks that change what a step computes within a run."""

_WITHIN_STEP = (
    *("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"),
    *("backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping"),
)
"""Hooks between the parts of a step, which a graph takes at once."""

_WITH_BATCH = "on_train_batch_start", "on_train_batch_end"


class _Module(Protocol):
    trainer: pl.Trainer
    finite_guard: FiniteGuard
    losses: Mapping[str, Term]


def why_not_graphed(module: pl.LightningModule) -> str | None:
    """Return what keeps the training step of a run from being captured and what to do about it, or ``None``.

    Args:
        module: The module in ``fit``, whose optimizer was built.
    """
    return next(reasons_against_graph(module), None)


def describe_graph(module: pl.LightningModule, cuda_graph: bool | str) -> list[str]:
    """Return the part of the sentence on speed that is about CUDA graphs; on other devices there is none.

    Args:
        module: The module in ``fit``.
        cuda_graph: The setting.
    """
    if cuda_graph is True:
        return ["the training step is a CUDA graph"]
    if cuda_graph is False or module.trainer.strategy.root_device.type != "cuda":
        return []
    reason = why_not_graphed(module)
    return [
        "the training step is no CUDA graph (cuda_graph=true may be faster for small networks)"
        if reason is None
        else f"the training step cannot be a CUDA graph, since {reason}"
    ]


def reads_no_batches(trainer: pl.Trainer) -> bool:
    """Return whether no callback of somebody else's sees training batches, so that these may be augmented later."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return not any(_is_foreign(callback, name) for callback in callbacks for name in _WITH_BATCH)


def reasons_against_graph(module: pl.LightningModule) -> Iterator[str]:
    """Yield all that keeps the training step of a run from being captured; see :func:`why_not_graphed`."""
    yield from _reasons(cast("_Module", module))


def _reasons(module: _Module) -> Iterator[str]:
    trainer = module.trainer
    device = trainer.strategy.root_device.type
    if device != "cuda":
        yield f"it runs on the device {device!r}; train on a CUDA device"
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        yield "it runs under a strategy for several devices; set trainer.devices to 1"
    if trainer.accumulate_grad_batches > 1:
        yield "gradients are accumulated over batches; set trainer.accumulate_grad_batches to 1"
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        yield "a gradient scaler waits for the device in each step; set trainer.precision to bf16-mixed"
    if trainer._detect_anomaly:  # it has no public name
        yield "anomalies are looked for in each step; set trainer.detect_anomaly to false"
    if module.finite_guard.mode == "skip":
        yield "steps that are not finite are undone from outside; set on_nonfinite to stop"
    yield from _reasons_of_optimizers(trainer)
    for name, term in getattr(module, "losses", {}).items():
        if not term.capturable:
            yield f"the loss {name!r} ({type(term).__name__}) cannot be captured; leave it out"
    yield from _reasons_of_hooks(module, trainer)


def _reasons_of_optimizers(trainer: pl.Trainer) -> Iterator[str]:
    for optimizer in trainer.optimizers:
        name = type(optimizer).__name__
        if not supports_found_inf(optimizer):
            clipped = " (the default one is not where gradients are clipped in mixed precision)"
            yield f"the optimizer {name} is not fused{clipped}; give an optimizer with fused=True"
        if _hooks(optimizer):
            yield f"the optimizer {name} has hooks; remove them"
    for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
        if isinstance(scheduler, OneCycleLR | CyclicLR) and scheduler.cycle_momentum:
            yield f"{type(scheduler).__name__} changes the momentum in each step; set its cycle_momentum to False"


def _reasons_of_hooks(module: _Module, trainer: pl.Trainer) -> Iterator[str]:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, _CHANGES_STEP):
            yield f"the callback {type(callback).__name__} changes what a step computes; leave it out"
    for part in (module, *callbacks):
        for name in _WITHIN_STEP:
            if _is_foreign(part, name):
                yield f"{type(part).__name__} has the hook {name}, which acts within a step; leave it out"


def _is_foreign(part: object, hook: str) -> bool:
    """Return whether a hook is defined outside of Lightning and this package."""
    found: Any = getattr(type(part), hook, None)
    package = "" if found is None else str(found.__module__).partition(".")[0]
    return package not in ("", "lightning", "kd_lightning")


def _hooks(optimizer: Optimizer) -> bool:
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
