"""DDP around a module whose trained weights have changed."""

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, Strategy

from kd_lightning.errors import UserError


def rewrap(strategy: Strategy) -> None:
    """Have the processes average the gradients of what trains now; nothing in one process.

    DDP decides which weights it averages when it wraps a module: one that begins to train later, or takes another's
    place, would go its own way on each rank. The new wrapper has the options of the old one, and begins as that did by
    sending the weights and buffers of rank 0 to all others. To be called by all ranks, between two steps.

    Raises:
        ValueError: If another strategy than DDP has wrapped the module.
    """
    if strategy.model is strategy.lightning_module:
        return
    if not isinstance(strategy, DDPStrategy):
        raise UserError(
            f"{type(strategy).__name__} cannot have other weights train than those that it began with; use "
            "trainer.strategy=ddp, or one device."
        )
    state: Any = strategy._ddp_comm_state
    for kept in ("error_dict", "p_memory_dict", "q_memory_dict"):  # PowerSGD's, of buckets that are no more
        getattr(state, kept, {}).clear()
    strategy.model = strategy.lightning_module
    strategy.configure_ddp()
