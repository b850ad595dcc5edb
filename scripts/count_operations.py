"""Count the operations of a training step: on a GPU each is at least one kernel that the host launches."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from stepwise_fit import quiet_trainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kd_lightning import networks

_LAUNCH_NOTHING = {
    *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"),
    *("aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh", "aten::_local_scalar_dense"),
    "aten::promote_types",
}
"""Allocations, views without an alias in their schema, and a read by the host, which copies and computes nothing."""


class OperationCounter(TorchDispatchMode):
    """Counts ATen operations by name; views, allocations and the profiler's records launch nothing and are left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not (func.is_view or name in _LAUNCH_NOTHING or name.startswith("profiler::")):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class _StepCounter(pl.Callback):
    """Counts from the end of one training step to the end of the next, so that making the batch is included."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.counter = OperationCounter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Start, or stop, to count."""
        if batch_idx == self.step:
            self.counter.__enter__()  # type: ignore[no-untyped-call]
        elif batch_idx == self.step + 1:
            self.counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            trainer.should_stop = True


def count_of_fit(module: pl.LightningModule, data: pl.LightningDataModule, *, step: int = 5) -> Counter[str]:
    """Return the operations of a step of ``Trainer.fit`` by name.

    Args:
        module: Module to train.
        data: Data module with batches for a few more steps.
        step: Number of the step after which counting begins: not before what a first epoch does once is done.
    """
    counter = _StepCounter(step)
    quiet_trainer("cpu", counter, max_epochs=1).fit(module, data)
    return counter.counter.counts


def count_of_raw_loop(teacher: nn.Module | None = None, *, batch_size: int = 32) -> Counter[str]:
    """Return the operations of a step of ResNet-20 in a hand-written loop whose batch is on the device already.

    Args:
        teacher: Network in eval mode from which the student learns; ``None`` to learn from labels.
        batch_size: Images in the batch.
    """
    student = networks.resnet20().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)
    images = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = student(images)
        loss = F.cross_entropy(logits.float(), labels)
        if teacher is not None:
            with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                targets = (teacher(images).float() / 4).log_softmax(1)
            soft = F.kl_div((logits.float() / 4).log_softmax(1), targets, reduction="batchmean", log_target=True)
            loss = 0.1 * loss + 0.9 * 16 * soft
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return _count(step)


def _count(step: Callable[[], None]) -> Counter[str]:
    step()
    step()
    counter = OperationCounter()
    with counter:
        step()
    return counter.counts
