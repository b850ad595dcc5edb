"""An epoch of distillation, its teacher online and cached, as a fraction of the floor that the hardware sets.

The floor of a step is the teacher's forward pass and three of the student's, each at the measured rate of a large
bfloat16 matrix product or at the measured bandwidth of a copy, whichever takes longer (every layer's output is written
and read once). An epoch that fills the cache counts as the first of V.

    python scripts/bench_epoch.py --device cuda
    python scripts/bench_epoch.py --images 4096 --batch-size 64 --threads 1
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning
import lightning.pytorch as pl
import torch
from bench_data import RandomImages
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kd_lightning import DistillationModule, TeacherModule, networks


class Hardware(NamedTuple):
    """FLOP a second of a bfloat16 matrix product, and bytes a second that a copy reads and writes."""

    flops: float
    bandwidth: float


def seconds(function: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The median of some runs after a first; CUDA's are timed by events."""
    found = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            found.append(float(start.elapsed_time(end)) / 1e3)
        else:
            begun = time.perf_counter()
            function()
            found.append(time.perf_counter() - begun)
    return statistics.median(found[1:])


def measured(device: torch.device) -> Hardware:
    size = 8192 if device.type == "cuda" else 1536
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return Hardware(
        2 * size**3 / seconds(lambda: left @ right, device),
        2 * 4 * source.numel() / seconds(lambda: target.copy_(source), device),
    )


def floor(network: nn.Module, hardware: Hardware, passes: int) -> float:
    """Seconds of an image."""
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


class Clock(pl.Callback):
    """Seconds of each epoch's steps."""

    def __init__(self) -> None:
        self.epochs: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begun = self._now(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append(self._now(pl_module) - self.begun)

    def _now(self, module: pl.LightningModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def epochs(module: pl.LightningModule, views: int | None, options: argparse.Namespace) -> list[float]:
    clock = Clock()
    names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet: dict[str, Any] = dict.fromkeys(names, False)
    trainer = pl.Trainer(
        accelerator=options.device,
        devices=1,
        precision="bf16-mixed",
        max_epochs=2,
        limit_val_batches=0,
        callbacks=[clock],
        **quiet,
    )
    trainer.fit(module, RandomImages(options.batch_size, views, options.images))
    return clock.epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="resnet34")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 for all")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    device = torch.device("cuda" if options.device in ("cuda", "gpu") else options.device)
    hardware = measured(device)
    teacher = getattr(networks, options.teacher)()
    student = floor(networks.resnet20(), hardware, passes=3)
    floors = {"online": floor(teacher, hardware, passes=1) + student, "cached": student, "student alone": student}
    common = {"teacher_check": "off", "compile": options.compile}
    found = {
        "online": epochs(DistillationModule(networks.resnet20(), teacher, **common), None, options),
        "cached": epochs(DistillationModule(networks.resnet20(), teacher, teacher_cache=True, **common), 1, options),
        "student alone": epochs(TeacherModule(networks.resnet20(), compile=options.compile), None, options),
    }
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"torch {torch.__version__}, lightning {lightning.__version__}, {options.teacher} -> resnet20, "
        f"{options.images} images, batch {options.batch_size}, {name}\n"
        f"matrix product {hardware.flops / 1e12:.3f} TFLOP/s, copy {hardware.bandwidth / 1e9:.1f} GB/s"
    )
    for side, (first, second) in found.items():
        fraction = options.images * floors[side] / second
        print(f"{side:<14} first epoch {first:7.2f} s, second {second:7.2f} s, {fraction:.0%} of the floor reached")


if __name__ == "__main__":
    main()
