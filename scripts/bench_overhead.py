"""Measure the cost of ``Trainer.fit`` above a hand-written loop of the same arithmetic, in microseconds a step.

python scripts/bench_overhead.py [--rounds 7] [--device cpu]
"""

import argparse
import statistics
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import lightning
import torch
import torch.nn.functional as F
from bench_data import RandomImages
from bench_step import fitted
from timing import time_rounds
from torch import nn

from kd_lightning import TeacherModule, networks
from kd_lightning.data.batch import Batch
from kd_lightning.modules.parameter_groups import parameter_groups


def raw(network: nn.Module, batch_size: int, device: torch.device) -> Callable[[int], None]:
    """Return a function that takes a number of steps with the same batches, network, loss, optimizer and schedule."""
    data = RandomImages(batch_size)
    network.to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        parameter_groups(network.parameters()), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def endless() -> Iterator[Batch]:
        while True:
            for batch in data.train_dataloader():
                yield data.augment(batch._replace(labels=batch.labels.to(device), ids=batch.ids.to(device)))

    batches = endless()

    def steps(count: int) -> None:
        for _ in range(count):
            images, labels, *_ = next(batches)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                logits = network(images)
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    return steps


class Tiny(nn.Module):
    """Computes next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(images[:, :, 0, 0])
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    device = torch.device(options.device)
    print(f"torch {torch.__version__}, lightning {lightning.__version__}, {options.device}, one thread")
    for network, batch_size, count in ((Tiny, 32, 200), (networks.resnet20, 128, 3)):
        options.batch_size = batch_size
        sides = {
            "fit": fitted(TeacherModule(network()), None, options),
            "raw loop": raw(network(), batch_size, device),
        }
        seconds = time_rounds({name: partial(steps, count) for name, steps in sides.items()}, options.rounds)
        fit, plain = (statistics.median(found) / count for found in seconds.values())
        print(
            f"{network.__name__:<9} batch {batch_size:>3}: fit {fit * 1e6:9,.0f} us, raw loop {plain * 1e6:9,.0f} us, "
            f"{(fit - plain) * 1e6:5,.0f} us above ({fit / plain:.3f})"
        )


if __name__ == "__main__":
    main()
