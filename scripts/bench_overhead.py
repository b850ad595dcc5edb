"""Measure what Lightning and this package add to each step, in microseconds.

A hand-written loop, Lightning's ``Trainer.fit`` of a plain module, and ``Trainer.fit`` of ``TeacherModule`` train on
the same batches with the same loss, optimizer and schedule. What the third costs above the second is this package's
share.

The row "replayed" is what the host does in a step that is a CUDA graph, whatever the network: there Lightning has a
module with nothing to do, and this package a graph with nothing in it.

    python scripts/bench_overhead.py [--rounds 7] [--steps 100] [--device cpu]
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from random_images import RandomImages
from stepwise_fit import StepwiseFit
from timing import repeat, time_rounds
from torch import nn

from kd_lightning import TeacherModule, networks
from kd_lightning.data import Batch
from kd_lightning.modules.graphed_step import GraphedStep
from kd_lightning.modules.parameter_groups import parameter_groups


def raw_step(network: nn.Module, batch_size: int, device: torch.device) -> Callable[[], None]:
    """Return a function that takes a step with the same batches, loss, optimizer and schedule as ``Trainer.fit``."""
    network.to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        parameter_groups(network.parameters()), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    batches = RandomImages(batch_size).augmented_batches(device)

    def step() -> None:
        images, labels, *_ = next(batches)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = network(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    return step


class PlainModule(pl.LightningModule):
    """A module with nothing but the loss, the optimizer and the schedule."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(self.network(batch.images).float(), batch.labels)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and the schedule of the other loops."""
        groups = parameter_groups(self.network.parameters())
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class IdleModule(PlainModule):
    """A module whose steps have nothing to compute, but for the schedule."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.static_loss = torch.zeros(())

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return a tensor that lies ready."""
        return self.static_loss

    def backward(self, loss: torch.Tensor, *arguments: Any, **options: Any) -> None:
        """Compute nothing."""

    def optimizer_zero_grad(self, *arguments: Any) -> None:
        """Forget nothing."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Call Lightning's closure and update nothing."""
        optimizer.step(closure=optimizer_closure)

    def configure_optimizers(self) -> Any:
        """Return an optimizer that only calls its closure."""
        configuration = super().configure_optimizers()
        configuration["optimizer"].step = CallClosure()
        return configuration


class CallClosure:
    """A replacement for an optimizer's ``step``."""

    _wrapped_by_lr_sched = True

    def __call__(self, closure: Callable[[], Any] | None = None) -> Any:
        """Call the closure."""
        return None if closure is None else closure()


class EmptyGraph(pl.Callback):
    """Lets a module take its steps by a graph in which nothing is captured."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take the place of the module's own graph."""
        trainer.datamodule.augments_in_step = True  # type: ignore[attr-defined]
        means = pl_module.epoch_metrics.means

        def capture(step: Callable[[], None]) -> Callable[[], None]:
            step()
            sums = means.sums
            return lambda: sums.fill_(1.0)  # an epoch without a finite step is an error

        pl_module.acceleration.graphed_step = GraphedStep(pl_module, trainer.optimizers[0], capture)
        pl_module.acceleration.graphed_step.attach()


class Tiny(nn.Module):
    """A network with almost nothing to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        logits: torch.Tensor = self.fc(images[:, :, 0, 0])
        return logits


def main() -> None:
    """Print the time of a step in the hand-written loop, and what is added to it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="steps in each round (default: 200; of ResNet-20 on a CPU 3)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    device = torch.device(options.device)
    print(f"torch {torch.__version__}, lightning {lightning.__version__}, {options.device}, one thread")
    steps = options.steps or 200
    batches = {name: RandomImages(32) for name in ("ours", "Lightning")}
    batches["Lightning"].augments_in_step = True
    idle: dict[str, Callable[[], object]] = {
        "ours": partial(StepwiseFit(TeacherModule(Tiny()), batches["ours"], options.device, EmptyGraph()), steps),
        "Lightning": partial(StepwiseFit(IdleModule(Tiny()), batches["Lightning"], options.device), steps),
    }
    ours, lightning_alone = (median(rounds) / steps * 1e6 for rounds in time_rounds(idle, options.rounds).values())
    print(f"replayed: Lightning {lightning_alone:,.0f} us, this package {ours - lightning_alone:+,.0f} us")
    few = 3 if device.type == "cpu" else 200
    for network, batch_size, usual in ((Tiny, 32, 200), (networks.resnet20, 128, few)):
        steps = options.steps or usual
        modules = {"TeacherModule": TeacherModule(network()), "plain module": PlainModule(network())}
        candidates: dict[str, Callable[[], object]] = {
            name: partial(StepwiseFit(module, RandomImages(batch_size), options.device), steps)
            for name, module in modules.items()
        }
        candidates["raw loop"] = repeat(raw_step(network(), batch_size, device), steps)
        seconds = time_rounds(candidates, options.rounds)
        ours, plain, raw = (median(rounds) / steps * 1e6 for rounds in seconds.values())
        print(
            f"{network.__name__:<9} batch {batch_size:>3}: raw loop {raw:9,.0f} us; "
            f"Lightning {plain - raw:+5,.0f} us, this package {ours - plain:+5,.0f} us"
        )


if __name__ == "__main__":
    main()
