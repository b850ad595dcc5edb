"""Count the operations of a training step in ``Trainer.fit`` and in a hand-written loop.

On a GPU each operation is at least one kernel, and small networks wait for the host to launch them. Views, allocations
and the profiler's records are left out. Each count lasts from the end of one step to the end of the next, so that
making the batch is in it; the batch of the hand-written loop is ready.

    python scripts/bench_operations.py [--teacher resnet34] [--details]
"""

import argparse
import warnings

import lightning
import torch
from count_operations import count_of_fit, count_of_raw_loop
from random_images import RandomImages

from kd_lightning import DistillationModule, TeacherModule, networks

BATCH_SIZE = 32


def main() -> None:
    """Print a line for each kind of step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="resnet34")
    parser.add_argument("--details", action="store_true", help="print what is counted beside the student's raw step")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    teacher = getattr(networks, options.teacher)()
    raw = count_of_raw_loop(batch_size=BATCH_SIZE)
    cached = DistillationModule(networks.resnet20(), teacher, teacher_cache=True, teacher_check="off")
    online = DistillationModule(networks.resnet20(), teacher, teacher_check="off")
    data = RandomImages(BATCH_SIZE, count=2000)
    counts = {
        "student alone": count_of_fit(TeacherModule(networks.resnet20()), data),
        "cached": count_of_fit(cached, RandomImages(BATCH_SIZE, views=1, count=2000)),
        "online": count_of_fit(online, data),
    }
    print(f"torch {torch.__version__}, lightning {lightning.__version__}, {options.teacher} -> resnet20")
    print(f"{'raw student':<14}{raw.total():5d} operations a step")
    for name, count in counts.items():
        print(f"{name:<14}{count.total():5d} operations a step, {count.total() - raw.total():+d}")
        if options.details:
            extra = {key: f"{count[key] - raw[key]:+d}" for key in count | raw if count[key] != raw[key]}
            print("   ", ", ".join(f"{key.removeprefix('aten::')} {value}" for key, value in sorted(extra.items())))


if __name__ == "__main__":
    main()
