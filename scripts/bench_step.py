"""Measure a distillation step with its batch: teacher online, cached logits, student alone, and two plain loops.

The plain loops are those of bench_baseline.py, a naive and a competent one; the others are each a ``Trainer.fit`` in
bfloat16 mixed precision. They alternate in one process with one torch thread, and the median over the rounds is
reported. Workers prepare batches while others are measured: a round on a GPU has enough steps to use them up.

    python scripts/bench_step.py [--teacher resnet56] [--batch-size 64] [--rounds 9] [--device cpu] [--compile]
    python scripts/bench_step.py --device cuda --cuda-graph
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
from bench_baseline import LOOPS, baseline_steps
from random_images import COUNT, RandomImages
from stepwise_fit import StepwiseFit
from timing import repeat, time_rounds

from kd_lightning import DistillationModule, TeacherModule, networks


def main() -> None:
    """Print milliseconds per step and ratios to the plain loops."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, help="steps in each round (default: 3, on a GPU 100)")
    parser.add_argument("--images", type=int, default=COUNT)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cuda-graph", action="store_true", help="capture the steps of the modules")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    device = torch.device("cuda" if options.device == "gpu" else options.device)
    count = options.steps or (100 if device.type == "cuda" else 3)
    teacher = getattr(networks, options.teacher)()
    common: dict[str, Any] = {"compile": options.compile, "cuda_graph": options.cuda_graph}
    distilled: dict[str, Any] = {"teacher_check": "off", **common}
    plain = baseline_steps(options.teacher, options.batch_size, device, options.images)

    def steps(module: pl.LightningModule, views: int | None = None) -> Callable[[], None]:
        fit = StepwiseFit(module, RandomImages(options.batch_size, views, options.images), options.device)
        return partial(fit, count)

    candidates = {
        **{name: repeat(step, count) for name, step in plain.items()},
        "online": steps(DistillationModule(networks.resnet20(), teacher, **distilled)),
        "cached": steps(DistillationModule(networks.resnet20(), teacher, teacher_cache=True, **distilled), views=1),
        "student alone": steps(TeacherModule(networks.resnet20(), **common)),
    }
    rounds = time_rounds(candidates, options.rounds)
    seconds = {name: [each / count for each in values] for name, values in rounds.items()}
    medians = {name: median(values) for name, values in seconds.items()}
    print(
        f"torch {torch.__version__}, lightning {lightning.__version__}, {options.teacher} -> resnet20, "
        f"batch {options.batch_size}, {options.device}, one thread"
    )
    print(f"{'':<26}" + "".join(f"{'x the ' + loop:>22}" for loop in LOOPS))
    for name, values in seconds.items():
        gains = "".join(f"{medians[loop] / medians[name]:22.2f}" for loop in LOOPS)
        spread = f"{min(values) * 1e3:.1f} to {max(values) * 1e3:.1f}"
        print(f"{name:<14}{medians[name] * 1e3:9.2f} ms{gains}   ({spread})")
    print(f"cached / student alone {medians['cached'] / medians['student alone']:.3f}")


if __name__ == "__main__":
    main()
