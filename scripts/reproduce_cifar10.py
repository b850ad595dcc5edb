"""Train the networks of the README's "Results", each row over seeds; finished runs are kept, interrupted runs resumed.

    python scripts/reproduce_cifar10.py short --weights resnet56.th --jobs 2       # ten epochs: hours on a CPU
    python scripts/reproduce_cifar10.py long -- --trainer.accelerator=gpu          # 50 and 200 epochs, for a GPU
    python scripts/reproduce_cifar10.py search --weights resnet56.th --jobs 2      # trials that selected the recipes
    python scripts/reproduce_cifar10.py student_10 kd_10 --seeds 0 1 -- \
        --data=kd_lightning.ImageFolderDataModule --data.root=images \
        --data.augmentation.preset=light                                           # rows by name, another data module
    python scripts/reproduce_cifar10.py short --weights resnet56.th --folder again # a repetition of the published runs

A run consists of two commands: `kd-lightning fit`, and `kd-lightning test` of the epoch with the best validation
accuracy. Only the second reads the test images, and the rows of `search` omit it. Seeds differ in the initial weights
and the order of images; the split into training and validation images, the views of an image and the teacher are the
same. The repository contains config.yaml and metrics.json of each run (lightning_logs/published/ROW/seed=N), but no
weights: to repeat a published run, name another --folder. Options after -- are passed to each fit.
`scripts/published_results.py` writes the table and the plot.

The weights for `short` are the ResNet-56 that Y. Idelbayev published (resnet56-4bfd9763.th), trained on CIFAR-10.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any

import torch
from cifar10_rows import GROUPS, ROWS, Row
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from kd_lightning.files.atomic import atomic_write
from kd_lightning.files.read import read_checkpoint
from kd_lightning.runs.commands import commands_left, process_words
from kd_lightning.runs.run import BEST, CHECKPOINTS, LAST, Run

PUBLISHED = Path("lightning_logs/published")


def main() -> None:
    """Train and test the missing runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", choices=[*GROUPS, *ROWS], metavar="ROW", help=", ".join([*GROUPS, *ROWS]))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of rows that have several")
    parser.add_argument("--weights", type=Path, help="weights of the published ResNet-56, from which teachers start")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time; they share the cores")
    parser.add_argument(
        "--folder", type=Path, default=PUBLISHED, help="folder of runs (default: lightning_logs/published)"
    )
    parser.add_argument("--epochs", type=int, help="epochs of every run, to try out the script")
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:end])
    added = [*arguments[end + 1 :], *([] if options.epochs is None else [f"--trainer.max_epochs={options.epochs}"])]
    runs = _runs(options.rows, options.seeds, options.folder)
    if any(run.row.published_weights and not run.done for run in runs) and options.weights is None:
        parser.error("ResNet-56 is trained from published weights; name their file with --weights")
    if all(run.done for run in runs):
        parser.exit(message=f"{options.folder} contains all of these runs; name another --folder to repeat them.\n")
    for run in _needed([run.name for run in runs if not run.done], options.folder):
        if run.done and not run.checkpoint.is_file():
            parser.error(f"{run.folder} contains metrics, but not {run.checkpoint.name}; train it in another --folder")
    total = sum(options.epochs or run.row.epochs for run in runs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.jobs))}
    finished = sum(run.epochs for run in runs)  # smoothing=0: estimate the time left from the mean since the start
    with (
        tqdm(total=total, initial=finished, unit="epoch", smoothing=0, dynamic_ncols=True) as bar,
        ThreadPoolExecutor(options.jobs) as pool,
    ):
        for stage in sorted({run.row.stage for run in runs}):
            part = [run for run in runs if run.row.stage == stage]
            futures = [pool.submit(run.finish, added, options.weights, environment, bar) for run in part]
            try:
                for future in futures:
                    future.result()
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)  # runs in progress finish
                sys.exit(str(error) or "Stopped; run the same command to resume.")


def _names(rows: list[str]) -> list[str]:
    return [name for row in rows for name in GROUPS.get(row, [row])]


def _needed(rows: list[str], root: Path) -> list["RowRun"]:
    """Return the runs that rows or groups of rows depend on: teachers and networks that initialize students."""
    return [RowRun(row, 0, root) for name in _names(rows) for row in (ROWS[name].initial, ROWS[name].teacher) if row]


def _runs(rows: list[str], seeds: list[int], root: Path = PUBLISHED) -> list["RowRun"]:
    """Return the runs of rows or groups of rows and the runs that they depend on, in the order of training."""
    selected = [RowRun(name, seed, root) for name in _names(rows) for seed in (seeds if ROWS[name].repeated else [0])]
    runs = dict.fromkeys([*selected, *_needed(rows, root)])
    return sorted(runs, key=lambda run: (run.row.stage, run.seed))


@dataclass(frozen=True)
class RowRun:
    """A run of a row with one seed.

    Attributes:
        name: Name of the row.
        seed: Seed of the initial weights and of the order of images.
        root: Folder of all runs.
    """

    name: str
    seed: int
    root: Path = PUBLISHED

    @property
    def row(self) -> Row:
        """Return the row."""
        return ROWS[self.name]

    @property
    def folder(self) -> Path:
        """Return the folder of the run."""
        return self.root / self.name / f"seed={self.seed}"

    @property
    def checkpoint(self) -> Path:
        """Return the checkpoint of the best epoch."""
        return self.folder / CHECKPOINTS / f"{BEST}.ckpt"

    @property
    def done(self) -> bool:
        """Return whether the metrics, which are written last, exist."""
        return (self.folder / "metrics.json").is_file()

    @property
    def epochs(self) -> int:
        """Return the number of finished epochs."""
        if self.done:
            return len(json.loads((self.folder / "metrics.json").read_text())["val_accuracy"])
        last = self.folder / CHECKPOINTS / f"{LAST}.ckpt"
        return int(read_checkpoint(last)["epoch"]) + 1 if last.is_file() else 0

    def finish(self, added: list[str], weights: Path | None, environment: dict[str, str], bar: tqdm) -> None:
        """Train and test the run and write its metrics, except for the steps that are already done.

        Raises:
            RuntimeError: If a command ends with an error.
        """
        reported = self.epochs
        self.folder.mkdir(parents=True, exist_ok=True)
        fit = self._fit(added, weights)
        commands = [] if self.done else commands_left(Run(self.folder), fit, test=self.row.tested)
        with (self.folder / "output.log").open("a") as log:
            for command in commands:
                words = process_words(command)
                with subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT) as process:
                    while process.poll() is None:
                        sleep(2)
                        bar.set_postfix_str(f"{self.name} seed={self.seed}")
                        finished = max(reported, self.epochs)
                        bar.update(finished - reported)
                        reported = finished
                if process.returncode:
                    raise RuntimeError(f"{self.folder} was not finished; see {log.name}.")
        if not self.done:
            with atomic_write(self.folder / "metrics.json") as file:
                file.write(f"{json.dumps(self._metrics(), indent=1)}\n".encode())
        bar.update(max(0, self.epochs - reported))

    def _fit(self, added: list[str], weights: Path | None) -> list[str]:
        row, log = self.row, "--trainer.logger.init_args"
        quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
        place = [f"{log}.save_dir={self.root}", f"{log}.name={self.name}", f"{log}.version={self.folder.name}"]
        data = [
            "--data.batch_size=128",
            "--data.augmentation.padding=4",
            f"--data.seed={self.seed}",
            "--data.split_seed=0",
        ]
        networks = [f"--model.network.path={weights}"] if self.row.published_weights else []
        if row.teacher is not None:
            networks = [f"--teacher={RowRun(row.teacher, 0, self.root).folder}"]
        if row.initial is not None:
            networks.append(f"--model.student.path={RowRun(row.initial, 0, self.root).checkpoint}")
        if row.cache is not None:
            networks.append(f"--model.teacher_cache={self.root / 'teacher_logits' / row.cache}")
        return [
            *("fit", "-c", row.recipe),
            *(word for word in added if word.startswith("--data=")),  # a class precedes its arguments
            *(f"--trainer.max_epochs={row.epochs}", "--trainer.precision=bf16-mixed", f"--seed_everything={self.seed}"),
            *(*quiet, *place, *data, *row.options, *networks),
            *(word for word in added if not word.startswith("--data=")),
        ]

    def _metrics(self) -> dict[str, Any]:
        """Return what the table and the plot show, from TensorBoard's event files and the results of the test."""
        curves: dict[str, dict[int, float]] = {"val/accuracy": {}, "train/loss": {}}
        seconds = 0.0
        for file in sorted(self.folder.glob("events.*")):
            events = EventAccumulator(str(file)).Reload()
            logged = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
            if not {"learning_rate", "train/loss"} & logged.keys():  # the events of the test
                continue
            times = [event.wall_time for values in logged.values() for event in values]
            seconds += max(times) - min(times)
            for tag, values in curves.items():
                values.update({event.step: event.value for event in logged.get(tag, [])})
        metrics: dict[str, Any] = {
            "what": self.row.what,
            "teacher": self.row.teacher,
            "alone": self.row.alone,
            "val_accuracy": [round(value, 4) for _, value in sorted(curves["val/accuracy"].items())],
            "train_loss": [round(value, 4) for _, value in sorted(curves["train/loss"].items())],
            "hours": round(seconds / 3600, 3),
            "torch": torch.__version__,
        }
        if self.row.tested:
            test = Run(self.folder).test or {}
            kept = [name for name in ("accuracy", "ece", "agreement", "loss", "parameters") if name in test]
            metrics["test"] = {name: test[name] for name in kept}
            metrics["device"] = _device(test["device"])
        return metrics


def _device(name: str) -> str:
    if name.startswith("cuda"):
        return torch.cuda.get_device_name(0)
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
