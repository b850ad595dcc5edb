"""Measure a distillation step with its batch: teacher online, cached logits, student alone, and the plain loop.

The plain loop is that of bench_baseline.py, in float32; the others are each a ``Trainer.fit`` in bfloat16 mixed
precision. They alternate in one process with one torch thread, and the median over the rounds is reported.

    python scripts/bench_step.py [--teacher resnet56] [--batch-size 64] [--rounds 9] [--device cpu] [--compile]
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median

import lightning
import lightning.pytorch as pl
import torch
from bench_baseline import PlainStep, plain_loader
from random_images import RandomImages, random_images
from stepwise_fit import StepwiseFit
from timing import repeat, time_rounds

from kd_lightning import DistillationModule, TeacherModule, networks


def main() -> None:
    """Print milliseconds per step and ratios to the plain loop."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="steps in each round")
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
        plain_loader(*random_images(), options.batch_size),
        torch.device(options.device if options.device != "gpu" else "cuda"),
    )

    def steps(module: pl.LightningModule, views: int | None = None) -> Callable[[], None]:
        fit = StepwiseFit(module, RandomImages(options.batch_size, views), options.device)
        return partial(fit, options.steps)

    candidates = {
        "plain loop": repeat(plain, options.steps),
        "online": steps(DistillationModule(networks.resnet20(), teacher, **common)),
        "cached": steps(DistillationModule(networks.resnet20(), teacher, teacher_cache=True, **common), views=1),
        "student alone": steps(TeacherModule(networks.resnet20(), compile=options.compile)),
    }
    rounds = time_rounds(candidates, options.rounds)
    seconds = {name: [each / options.steps for each in values] for name, values in rounds.items()}
    medians = {name: median(values) for name, values in seconds.items()}
    print(
        f"torch {torch.__version__}, lightning {lightning.__version__}, {options.teacher} -> resnet20, "
        f"batch {options.batch_size}, {options.device}, one thread"
    )
    for name, values in seconds.items():
        gain = medians["plain loop"] / medians[name]
        spread = f"{min(values) * 1e3:.1f} to {max(values) * 1e3:.1f}"
        print(f"{name:<14}{medians[name] * 1e3:8.1f} ms   {gain:5.2f} x the plain loop   ({spread})")
    print(f"cached / student alone {medians['cached'] / medians['student alone']:.3f}")


if __name__ == "__main__":
    main()
