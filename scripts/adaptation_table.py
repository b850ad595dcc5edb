"""Run the recipes adapt/* over seeds, digits to MNIST, and print the README's table; finished runs are kept.

    python scripts/lay_out_mnist.py t10k-images-idx3-ubyte.gz t10k-labels-idx1-ubyte.gz  # or let MNIST be downloaded
    python scripts/adaptation_table.py [--seeds 5] [--turned] [--methods mmd cdan] [-- --data.target.root=data]

The tested checkpoint is that with the highest val/criterion, which uses no labels of the target. The last column is how
much higher the validation accuracy of the best epoch is, by the target's labels, than that of the selected epoch.
Options after -- are passed to each fit.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd_lightning.runs.commands import commands_left, process_words
from kd_lightning.runs.run import Run

METHODS = ["source_only", "reweight", "kmm", "mmd", "coral", "dann", "cdan"]
TURNED = ["--data.augmentation.rotation=15", "--data.augmentation.scaling=0.2"]


def main() -> None:
    """Run what is missing and print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--turned", action="store_true", help="rotate and scale training images at random")
    parser.add_argument("rest", nargs="*", help="options of fit, after --")
    options = parser.parse_args()
    print("| method | test accuracy | lowest to highest | oracle's gain on val |\n| --- | ---: | ---: | ---: |")
    for method in options.methods:
        runs = [_run(method, seed, options.turned, options.rest) for seed in range(options.seeds)]
        accuracies = [(run.test or {})["accuracy"] for run in runs]
        spread = stdev(accuracies) if len(runs) > 1 else 0.0
        print(
            f"| {method}{' (turned)' if options.turned else ''} | {mean(accuracies):.1%} ± {spread:.1%} "
            f"| {min(accuracies):.1%} to {max(accuracies):.1%} | {mean(map(_oracle_gain, runs)):.1%} |",
            flush=True,
        )


def _run(method: str, seed: int, turned: bool, rest: list[str]) -> Run:
    """Return a trained and tested run; train and test it if necessary."""
    logs = Path("lightning_logs", "adaptation_turned" if turned else "adaptation")
    run = Run(logs / "adapt" / method / f"seed_{seed}")
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    place = [f"--trainer.logger.save_dir={logs}", f"--trainer.logger.version={run.folder.name}"]
    seeds = [f"--{name}={seed}" for name in ("seed_everything", "data.source.seed", "data.target.seed")]
    fit = ["fit", "-c", f"adapt/{method}", *quiet, *place, *seeds, *(TURNED if turned else []), *rest]
    for command in commands_left(run, fit):
        process = subprocess.run(process_words(command), capture_output=True, text=True, check=False)
        if process.returncode:
            sys.exit(process.stderr[-2000:])
    return run


def _oracle_gain(run: Run) -> float:
    """Return how much higher the target's best validation accuracy is than that of the selected epoch."""
    events = EventAccumulator(str(run.folder)).Reload()
    criterion, oracle = ([event.value for event in events.Scalars(tag)] for tag in ("val/criterion", "oracle/accuracy"))
    return float(max(oracle) - oracle[criterion.index(max(criterion))])


if __name__ == "__main__":
    main()
