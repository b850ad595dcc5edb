"""A stand-in for CUDA graphs on any device: the operations of a step are recorded once, and replayed.

As in a graph, a replay runs no Python: numbers, decisions and shapes are those of the recorded step, and tensors are
read and written where they were. What a graph cannot contain is an error: operations that wait for the device and, on
the device of ``other_device.py``, copies from and to the host.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from refuse_waiting import refuse_waiting
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from kd_lightning.modules.graphed_step import GraphedStep


class _Operation(NamedTuple):
    operator: Any
    args: Any
    kwargs: dict[str, Any]
    results: list[Tensor]

    def run(self) -> None:
        """Run it again, and write its results where the first ones are."""
        again = _tensors(self.operator(*self.args, **self.kwargs))
        for before, now in zip(self.results, again, strict=True):
            if now is not before:
                before.copy_(now)


class RecordStep(TorchDispatchMode):
    """Records the operations of a step on a device.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.operations: list[_Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs, results = _tensors((args, kwargs)), _tensors(result)
        if any(tensor.device.type == self.device.type for tensor in (*inputs, *results)):
            refuse_waiting(func, args)
            self._refuse_copies(func, inputs, results)
            if not func.is_view:
                args, kwargs = pytree.tree_map_only(Tensor, self._keep, (args, kwargs))
                self.operations.append(_Operation(func, args, kwargs, results))
        return result

    def _keep(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the device, or the present value of a number that lies on the host."""
        return tensor if tensor.device.type == self.device.type else tensor.clone()

    def _refuse_copies(self, operator: Any, inputs: list[Tensor], results: list[Tensor]) -> None:
        on_host = [tensor for tensor in (*inputs, *results) if tensor.device.type != self.device.type]
        if any(tensor.dim() > 0 for tensor in on_host) or (on_host and operator.name().startswith("aten::_to_copy")):
            raise RuntimeError(f"{operator.name()} copies between the host and the device")

    def replay(self) -> None:
        """Run the operations again."""
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            for operation in self.operations:
                operation.run()


class ReplayStep(pl.Callback):
    """Lets a module take its steps as by a graph.

    Args:
        warm_up: Steps before a capture.
    """

    def __init__(self, *, warm_up: int = 2) -> None:
        self.warm_up = warm_up
        self.captures = self.replays = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "augments_in_step"):
            data.augments_in_step = True
        self.device, self.began_at = pl_module.device, trainer.global_step
        graphed_step = GraphedStep(pl_module, trainer.optimizers[0], self.capture)
        graphed_step.attach()
        pl_module.acceleration.graphed_step = graphed_step

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        for _ in range(self.warm_up):
            step()
        with RecordStep(self.device) as recorded:
            step()

        def replay() -> None:
            self.replays += 1
            recorded.replay()

        return replay

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        assert self.replays > 0 or trainer.global_step == self.began_at


def _tensors(value: Any) -> list[Tensor]:
    return [part for part in pytree.tree_leaves(value) if isinstance(part, Tensor)]
