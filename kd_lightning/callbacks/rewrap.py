"""Wraps a module in DDP again after its trained weights have changed."""

from lightning.pytorch.strategies import DDPStrategy, Strategy

from kd_lightning.errors import UserError


def rewrap(strategy: Strategy) -> None:
    """Average the gradients of the weights that train now over all processes; do nothing in a single process.

    DDP decides which weights it averages when it wraps a module: a weight that starts to train later, or that replaces
    another, would diverge between ranks. The new wrapper has the options of the old one and, like the old one, first
    broadcasts the weights and buffers of rank 0. All ranks have to call this, between two steps.

    Raises:
        UserError: If a strategy other than DDP has wrapped the module.
    """
    if strategy.model is strategy.lightning_module:
        return
    if not isinstance(strategy, DDPStrategy):
        raise UserError(
            f"{type(strategy).__name__} cannot change which weights train during a run; use trainer.strategy=ddp, or "
            "one device."
        )
    state: object = strategy._ddp_comm_state
    for name in ("error_dict", "p_memory_dict", "q_memory_dict"):  # PowerSGD's, of buckets that no longer exist
        getattr(state, name, {}).clear()
    strategy.model = strategy.lightning_module
    strategy.configure_ddp()
