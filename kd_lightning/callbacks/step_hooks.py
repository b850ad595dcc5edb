"""A base of callbacks that cost nothing in steps in which they have nothing to do."""

from typing import Any

import lightning.pytorch as pl

STEP_HOOKS = (
    *("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_train_batch_end"),
)
"""The hooks that Lightning calls in each training step."""


class CallbackWithoutIdleHooks(pl.Callback):
    """A callback whose hooks of a training step are those that it defines; the others are ``None``.

    Lightning calls six hooks of each callback in each step, most of which do nothing, and passes over what cannot be
    called. With the eight callbacks that a module of this package attaches, that is a tenth of a millisecond.

    Example:
        >>> class Counts(CallbackWithoutIdleHooks):
        ...     def on_train_batch_end(self, *arguments): ...
        >>> [name for name in STEP_HOOKS if callable(getattr(Counts(), name))]
        ['on_train_batch_end']
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Set the hooks to ``None`` that neither the class nor its bases define."""
        super().__init_subclass__(**options)
        for name in STEP_HOOKS:
            if getattr(cls, name) is getattr(pl.Callback, name):
                setattr(cls, name, None)
