"""A distillation step, its batch included: online, with cached logits, and the student alone, against the plain loop.

Each side but the plain loop is a real ``Trainer.fit`` that waits and is let go in its turn; the median of the rounds
counts. bfloat16 mixed precision on our sides, float32 in the plain loop, one torch thread.

    python scripts/bench_step.py [--teacher resnet56] [--batch-size 64] [--rounds 9] [--device cpu] [--compile]
"""

import argparse
import statistics
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from bench_baseline import PlainStep, plain_loader, random_images
from bench_data import RandomImages
from timing import repeat, time_rounds

from kd_lightning import DistillationModule, TeacherModule, networks

COUNT = 20_000


class Turns(pl.Callback):
    """Lets a trainer, in a thread of its own, make some steps at a time."""

    def __init__(self) -> None:
        self.go, self.done, self.left = threading.Semaphore(0), threading.Semaphore(0), 0

    def steps(self, count: int) -> None:
        self.left = count
        self.go.release()
        self.done.acquire()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.set_num_threads(1)  # OpenMP has a setting for each thread
        self.go.acquire()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.left -= 1
        if not self.left:
            self.done.release()
            self.go.acquire()


def fitted(module: pl.LightningModule, views: int | None, options: argparse.Namespace) -> Callable[[int], None]:
    """A fit that is under way, as a function that makes so many steps."""
    turns, data = Turns(), RandomImages(options.batch_size, views)
    names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet: dict[str, Any] = dict.fromkeys(names, False)
    trainer = pl.Trainer(
        accelerator=options.device,
        devices=1,
        precision="bf16-mixed",
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[turns],
        **quiet,
    )
    threading.Thread(target=trainer.fit, args=(module, data), daemon=True).start()
    return turns.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    teacher = getattr(networks, options.teacher)()
    common = {"teacher_check": "off", "compile": options.compile}
    plain = PlainStep(
        getattr(networks, options.teacher)(),
        networks.resnet20(),
        plain_loader(*random_images(COUNT), options.batch_size),
        torch.device(options.device if options.device != "gpu" else "cuda"),
    )
    sides: dict[str, Callable[[int], None]] = {
        "plain loop": lambda count: repeat(plain, count)(),
        "online": fitted(DistillationModule(networks.resnet20(), teacher, **common), None, options),
        "cached": fitted(DistillationModule(networks.resnet20(), teacher, teacher_cache=True, **common), 1, options),
        "student alone": fitted(TeacherModule(networks.resnet20(), compile=options.compile), None, options),
    }
    spent = time_rounds({name: partial(steps, options.steps) for name, steps in sides.items()}, options.rounds)
    seconds = {name: [each / options.steps for each in found] for name, found in spent.items()}
    median = {name: statistics.median(found) for name, found in seconds.items()}
    print(
        f"torch {torch.__version__}, lightning {lightning.__version__}, {options.teacher} -> resnet20, "
        f"batch {options.batch_size}, {options.device}, one thread"
    )
    for name, found in seconds.items():
        gain = median["plain loop"] / median[name]
        spread = f"{min(found) * 1e3:.1f} to {max(found) * 1e3:.1f}"
        print(f"{name:<14}{median[name] * 1e3:8.1f} ms   {gain:5.2f} x the plain loop   ({spread})")
    print(f"cached / student alone {median['cached'] / median['student alone']:.3f}")


if __name__ == "__main__":
    main()
