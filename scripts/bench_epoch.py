"""Measure an epoch of distillation, its teacher online and cached, as a fraction of the speed that the hardware allows.

The limit of a step is the teacher's forward pass and three of the student's (forward and backward). A pass takes its
operations at the measured rate of a large bfloat16 matrix product, or its memory traffic (the output of each layer is
written and read once) at the measured bandwidth of a copy, whichever is slower. With cached logits the first V
epochs run the teacher and fill the cache, one view each; here V is 1.

    python scripts/bench_epoch.py --device cuda [--cuda-graph] [--compile]
    python scripts/bench_epoch.py --images 4096 --batch-size 64 --threads 1
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning
import lightning.pytorch as pl
import torch
from environment import processor_name
from random_images import RandomImages
from stepwise_fit import quiet_trainer
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from kd_lightning import DistillationModule, TeacherModule, networks


class Hardware(NamedTuple):
    """FLOP per second of a bfloat16 matrix product, and bytes per second that a copy reads and writes."""

    flops: float
    bandwidth: float


def seconds(function: Callable[[], object]) -> float:
    """Return the median time of a call."""
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=0.5).median)


def measure_hardware(device: torch.device) -> Hardware:
    """Return the speeds that a device reaches."""
    size = 8192 if device.type == "cuda" else 1536
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return Hardware(
        2 * size**3 / seconds(lambda: left @ right),
        2 * 4 * source.numel() / seconds(lambda: target.copy_(source)),
    )


def least_seconds(network: nn.Module, hardware: Hardware, passes: int) -> float:
    """Return the time that the hardware needs for an image.

    Args:
        network: Network that receives the image.
        hardware: Speeds of the device.
        passes: Number of forward passes.
    """
    images = torch.randn(1, 3, 32, 32)
    written = 0

    def count(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal written
        written += 2 * output.numel()  # bytes of bfloat16

    leaves = [part for part in network.modules() if not list(part.children())]
    hooks = [part.register_forward_hook(count) for part in leaves if not isinstance(part, nn.BatchNorm2d)]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(images)
    for hook in hooks:
        hook.remove()
    return passes * max(float(counter.get_total_flops()) / hardware.flops, 2 * written / hardware.bandwidth)


class EpochTimer(pl.Callback):
    """Measures the seconds of each epoch's steps."""

    def __init__(self) -> None:
        self.epochs: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.start = self._now(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the time."""
        self.epochs.append(self._now(pl_module) - self.start)

    def _now(self, module: pl.LightningModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def time_epochs(module: pl.LightningModule, views: int | None, options: argparse.Namespace) -> list[float]:
    """Return the seconds of two epochs."""
    timer = EpochTimer()
    trainer = quiet_trainer(options.device, timer, max_epochs=2)
    trainer.fit(module, RandomImages(options.batch_size, views, options.images))
    return timer.epochs


def main() -> None:
    """Print the seconds of the first and second epoch, and the fraction of the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="resnet34")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="number of torch threads, 0 for torch's default")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cuda-graph", action="store_true", help="capture the steps of the modules")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    device = torch.device("cuda" if options.device in ("cuda", "gpu") else options.device)
    hardware = measure_hardware(device)
    teacher = getattr(networks, options.teacher)()
    student = least_seconds(networks.resnet20(), hardware, passes=3)
    limits = {
        "online": least_seconds(teacher, hardware, passes=1) + student,
        "cached": student,
        "student alone": student,
    }
    print(
        f"torch {torch.__version__}, lightning {lightning.__version__}, {options.teacher} -> resnet20, "
        f"{options.images} images, batch {options.batch_size}, {processor_name(device)}\n"
        f"matrix product {hardware.flops / 1e12:.3f} TFLOP/s, copy {hardware.bandwidth / 1e9:.1f} GB/s",
        flush=True,
    )
    common: dict[str, Any] = {"compile": options.compile, "cuda_graph": options.cuda_graph}
    distilled: dict[str, Any] = {"teacher_check": "off", **common}
    cached = DistillationModule(networks.resnet20(), teacher, teacher_cache=True, **distilled)
    runs = {
        "online": (DistillationModule(networks.resnet20(), teacher, **distilled), None),
        "cached": (cached, 1),
        "student alone": (
            TeacherModule(networks.resnet20(), **common),
            None,
        ),
    }
    for name, (module, views) in runs.items():
        first, second = time_epochs(module, views, options)
        fraction = options.images * limits[name] / second
        print(
            f"{name:<14} first epoch {first:7.2f} s, second {second:7.2f} s, {fraction:.0%} of the hardware's limit",
            flush=True,
        )


if __name__ == "__main__":
    main()
