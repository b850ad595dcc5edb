"""A stand-in for CUDA graphs, with which a step that is replayed can be tested on any device."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch

from kd_lightning.modules.graphed_step import GraphedStep


class ReplayFunction(pl.Callback):
    """Lets a module take its steps as by a graph; what is replayed is the function itself.

    Args:
        warm_up: Steps before a capture.
    """

    def __init__(self, *, warm_up: int = 3) -> None:
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

        def replay() -> None:  # captured kernels do not see the context of a replay
            self.replays += 1
            with torch.autocast(self.device.type, enabled=False):
                step()

        return replay

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        assert self.replays > 0 or trainer.global_step == self.began_at
