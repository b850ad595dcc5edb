"""Measure the overhead of ``Trainer.fit`` over a hand-written loop of the same arithmetic, in microseconds per step.

python scripts/bench_overhead.py [--rounds 7] [--device cpu]
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median

import lightning
import torch
import torch.nn.functional as F
from random_images import RandomImages
from stepwise_fit import StepwiseFit
from timing import repeat, time_rounds
from torch import nn

from kd_lightning import TeacherModule, networks
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
    """Print the time of a step in both loops and the difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    device = torch.device(options.device)
    print(f"torch {torch.__version__}, lightning {lightning.__version__}, {options.device}, one thread")
    for network, batch_size, steps in ((Tiny, 32, 200), (networks.resnet20, 128, 3)):
        fit = StepwiseFit(TeacherModule(network()), RandomImages(batch_size), options.device)
        raw = raw_step(network(), batch_size, device)
        seconds = time_rounds({"fit": partial(fit, steps), "raw loop": repeat(raw, steps)}, options.rounds)
        of_fit, of_raw = (median(rounds) / steps for rounds in seconds.values())
        print(
            f"{network.__name__:<9} batch {batch_size:>3}: "
            f"fit {of_fit * 1e6:9,.0f} us, raw loop {of_raw * 1e6:9,.0f} us, "
            f"{(of_fit - of_raw) * 1e6:5,.0f} us overhead ({of_fit / of_raw:.3f})"
        )


if __name__ == "__main__":
    main()
