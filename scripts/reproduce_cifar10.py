"""Train the networks of the README's "Results", each row over seeds; finished runs are kept, interrupted ones resumed.

    python scripts/reproduce_cifar10.py short --weights resnet56.th --jobs 2       # ten epochs: hours on a CPU
    python scripts/reproduce_cifar10.py long -- --trainer.accelerator=gpu          # 50 and 200 epochs, for a GPU
    python scripts/reproduce_cifar10.py search --weights resnet56.th --jobs 2      # the trials that chose the recipes
    python scripts/reproduce_cifar10.py student_10 kd_10 --seeds 0 1 -- \
        --data=kd_lightning.ImageFolderDataModule --data.root=images               # rows by name; any data module
    python scripts/reproduce_cifar10.py short --weights resnet56.th --folder again # beside the published ones

Every run is two ordinary commands, `kd-lightning fit` and `kd-lightning test` of its best epoch on the validation
images; the test images are read once, by the second, and not at all in the rows of `search`. Seeds differ in the
initial weights and the order of images; the split into training and validation images, the views of an image and the
teacher are the same in all. A run's folder, lightning_logs/published/ROW/seed=N, keeps config.yaml and metrics.json in
the repository, and no weights: to repeat a published run, name another --folder. Options after -- are passed to each
fit. `scripts/published_results.py` writes the table and the plot.

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
    """Train and test the runs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", choices=[*GROUPS, *ROWS], metavar="ROW", help=", ".join([*GROUPS, *ROWS]))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of rows that are run over several")
    parser.add_argument("--weights", type=Path, help="the published ResNet-56, from which teachers start")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; they share the cores")
    parser.add_argument("--folder", type=Path, default=PUBLISHED, help="folder of the runs (lightning_logs/published)")
    parser.add_argument("--epochs", type=int, help="epochs of every run, to try the script out")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:cut])
    added = [*words[cut + 1 :], *([] if options.epochs is None else [f"--trainer.max_epochs={options.epochs}"])]
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
    behind = sum(run.epochs for run in runs)  # smoothing=0: the time left by the mean since the start
    with (
        tqdm(total=total, initial=behind, unit="epoch", smoothing=0, dynamic_ncols=True) as bar,
        ThreadPoolExecutor(options.jobs) as pool,
    ):
        for stage in sorted({run.row.stage for run in runs}):
            part = [run for run in runs if run.row.stage == stage]
            futures = [pool.submit(run.finish, added, options.weights, environment, bar) for run in part]
            try:
                for future in futures:
                    future.result()
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)  # running ones finish
                sys.exit(str(error) or "Stopped; run the same command to resume.")


def _names(rows: list[str]) -> list[str]:
    return [name for row in rows for name in GROUPS.get(row, [row])]


def _needed(rows: list[str], root: Path) -> list["RowRun"]:
    """Return the runs that rows or groups of them start from: their teachers and the networks of their students."""
    return [RowRun(row, 0, root) for name in _names(rows) for row in (ROWS[name].begins, ROWS[name].teacher) if row]


def _runs(rows: list[str], seeds: list[int], root: Path = PUBLISHED) -> list["RowRun"]:
    """Return the runs of rows or groups of them, after those that they need, in the order of training."""
    selected = [RowRun(name, seed, root) for name in _names(rows) for seed in (seeds if ROWS[name].repeated else [0])]
    runs = dict.fromkeys([*selected, *_needed(rows, root)])
    return sorted(runs, key=lambda run: (run.row.stage, run.seed))


@dataclass(frozen=True)
class RowRun:
    """A run of a row with a seed.

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
        """Return whether the metrics are written, which is the last step."""
        return (self.folder / "metrics.json").is_file()

    @property
    def epochs(self) -> int:
        """Return the number of finished epochs."""
        if self.done:
            return len(json.loads((self.folder / "metrics.json").read_text())["val_accuracy"])
        last = self.folder / CHECKPOINTS / f"{LAST}.ckpt"
        return int(read_checkpoint(last)["epoch"]) + 1 if last.is_file() else 0

    def finish(self, added: list[str], weights: Path | None, environment: dict[str, str], bar: tqdm) -> None:
        """Train, test and write the metrics, as far as that is not done.

        Raises:
            RuntimeError: If a command ends with an error.
        """
        seen = self.epochs
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
                        now = max(seen, self.epochs)
                        bar.update(now - seen)
                        seen = now
                if process.returncode:
                    raise RuntimeError(f"{self.folder} was not finished; see {log.name}.")
        if not self.done:
            with atomic_write(self.folder / "metrics.json") as file:
                file.write(f"{json.dumps(self._metrics(), indent=1)}\n".encode())
        bar.update(max(0, self.epochs - seen))

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
        if row.begins is not None:
            networks.append(f"--model.student.path={RowRun(row.begins, 0, self.root).checkpoint}")
        if row.cache is not None:
            networks.append(f"--model.teacher_cache={self.root / 'teacher_logits' / row.cache}")
        return [
            *("fit", "-c", row.recipe),
            *(word for word in added if word.startswith("--data=")),  # the class before its arguments
            *(f"--trainer.max_epochs={row.epochs}", "--trainer.precision=bf16-mixed", f"--seed_everything={self.seed}"),
            *(*quiet, *place, *data, *row.options, *networks),
            *(word for word in added if not word.startswith("--data=")),
        ]

    def _metrics(self) -> dict[str, Any]:
        """Return the contents of the table and the plot, from the files of TensorBoard and the test."""
        curves: dict[str, dict[int, float]] = {"val/accuracy": {}, "train/loss": {}}
        seconds = 0.0
        for file in sorted(self.folder.glob("events.*")):
            events = EventAccumulator(str(file)).Reload()
            logged = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
            if "learning_rate" not in logged:  # of the test
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
