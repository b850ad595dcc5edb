"""Train a teacher, a student alone on few labels, and the same student distilled; measure what distillation gains.

python scripts/quickstart.py            # quickstart.sh runs it after the installation

Everything that it runs is a `kd-lightning` command, printed into log.txt in the folder of its results.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median, stdev
from time import perf_counter, process_time
from typing import TypedDict

os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks this small are slower with more, and results depend on it

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

FEW = "--data.labels_per_class=5"
FITS = {
    "teacher": ["-c", "digits/teacher", "--trainer.max_epochs=30"],
    # an epoch is one step: as many steps as the distilled student takes, and as many validations to choose the best of
    "alone": [
        *("-c", "digits/student", FEW, "--data.labelled_only=true"),
        *("--trainer.max_epochs=1020", "--trainer.check_val_every_n_epoch=17"),
    ],
    "distilled": ["-c", "digits/distill", FEW, "--trainer.max_epochs=60"],
}
TITLES = {
    "teacher": "Teacher, all 1,150 labels",
    "alone": "Student alone, 50 labels",
    "distilled": "Student distilled, 50 labels",
}
OWN_IMAGES = "compress -c photos --data.root my_images -o chain"
"""The command for a folder my_images/<class>/*.jpg."""

Advance = Callable[[int, str], None]
"""Advances a bar by some steps, and sets the text behind it."""


class Results(TypedDict):
    """Test accuracies in the order of the seeds, and the exported files of the first seed."""

    test_accuracy: dict[str, list[float]]
    bytes: dict[str, int]
    latency_ms: dict[str, float]
    seconds: float
    cpu_seconds: float


def main() -> None:
    """Run all stages, write what was gained to results.json, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each network")
    parser.add_argument("--folder", type=Path, help="a new folder for runs, files and the report")
    parser.add_argument("--short", action="store_true", help="two epochs each, to try the script itself")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be >= 2, since one run has no interval.")
    folder: Path = options.folder or free_folder(Path("lightning_logs"))
    if folder.exists():
        parser.error(f"{str(folder)!r} exists; name another --folder.")
    folder.mkdir(parents=True)
    with all_output_in(folder / "log.txt") as console:
        results = run(folder, range(options.seeds), short=options.short, console=console)
        (folder / "results.json").write_text(f"{json.dumps(results, indent=1)}\n")
    print("", *last_lines(results, folder), sep="\n")


def free_folder(logs: Path) -> Path:
    """Return the first of the folders quickstart, quickstart_1, ... that does not exist."""
    names = ["quickstart", *(f"quickstart_{number}" for number in range(1, 10_000))]
    return next(logs / name for name in names if not (logs / name).exists())


# --- the stages


def run(folder: Path, seeds: Sequence[int], *, short: bool, console: Console) -> Results:
    """Train and test every network once for each seed, export those of the first, and write a report on the files."""
    started, computed = perf_counter(), process_time()
    accuracies = {name: train(name, folder, seeds, short=short, console=console) for name in FITS}
    files = {name: folder / f"{name}.onnx" for name in FITS}
    with stage(console, "Export to ONNX, and report", len(files) + 1) as advance:
        for name, file in files.items():
            call(["export", str(run_folder(folder, name, seeds[0])), "-o", str(file)])
            advance(1, "")
        named = [str(file) for file in files.values()]
        call(["report", *named, "--teacher", named[0], "-o", str(folder / "report")])
        times = latencies(files)
        advance(1, "")
    return {
        "test_accuracy": accuracies,
        "bytes": {name: file.stat().st_size for name, file in files.items()},
        "latency_ms": times,
        "seconds": round(perf_counter() - started, 1),
        "cpu_seconds": round(process_time() - computed, 1),
    }


def train(name: str, folder: Path, seeds: Sequence[int], *, short: bool, console: Console) -> list[float]:
    """Train and test one of the networks with each seed; return the test accuracies."""
    from kd_lightning.runs.run import Run

    last = ["--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1"] if short else []
    epochs = int([word for word in [*FITS[name], *last] if "max_epochs" in word][-1].partition("=")[2])
    tested: list[float] = []
    with stage(console, TITLES[name], epochs * len(seeds)) as advance:
        for seed in seeds:
            place = run_folder(folder, name, seed)
            command = [*fit_command(name, place, seed, run_folder(folder, "teacher", seed)), *last]
            if name == "distilled":
                command += gap_closed(run_folder(folder, "alone", seed))
            call(command, lambda: advance(1, in_per_cent(tested)))
            call(["test", "-c", str(place)])
            tested.append((Run(place).test or {})["accuracy"])
            advance(0, in_per_cent(tested))
    return tested


def fit_command(name: str, place: Path, seed: int, teacher: Path) -> list[str]:
    """Return the words that train one of the networks.

    Args:
        name: Its name in ``FITS``.
        place: Folder of the run.
        seed: Seed of the labelled images, the first weights and the order; the split stays the same.
        teacher: Folder of the teacher's run.
    """
    log = "--trainer.logger.init_args"
    where = [f"{log}.save_dir={place.parent.parent}", f"{log}.name={place.parent.name}", f"{log}.version={place.name}"]
    seeds = [f"--seed_everything={seed}", f"--data.seed={seed}", "--data.split_seed=0"]
    return ["fit", *FITS[name], *seeds, *where, *(["--teacher", str(teacher)] if name == "distilled" else [])]


def gap_closed(alone: Path) -> list[str]:
    """Return the words that add a curve of the gap closed between a run of the student alone and the teacher."""
    from kd_lightning.runs.run import Run

    best = Run(alone).best_file
    return ["--trainer.callbacks+=kd_lightning.callbacks.GapClosed", f"--trainer.callbacks.alone={best}"]


def run_folder(folder: Path, name: str, seed: int) -> Path:
    """Return the folder of a run, whose name is that of its curves in TensorBoard."""
    return folder / name / f"seed_{seed}"


def call(words: list[str], after_epoch: Callable[[], None] | None = None) -> None:
    """Run a command in this process, as `kd-lightning` does, to import everything only once.

    Args:
        words: Words of the command.
        after_epoch: Function that is called after each epoch of a ``fit``.
    """
    from lightning.pytorch.callbacks import Callback, LambdaCallback, ModelCheckpoint

    from kd_lightning.cli import lightning_cli, main

    class Watched(lightning_cli.CommandLine):
        def before_fit(self) -> None:
            """Call the function after each epoch, and save the best epoch only, as epochs are short here."""
            callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            callbacks[:] = [c for c in callbacks if not isinstance(c, ModelCheckpoint) or c.monitor]
            if after_epoch is not None:
                callbacks.append(LambdaCallback(on_train_epoch_end=lambda *_: after_epoch()))

    print(f"\n$ kd-lightning {shlex.join(words)}", flush=True)
    sys.argv = ["kd-lightning", *words]
    if words[0] in ("fit", "test"):
        sys.argv += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
        lightning_cli.run(Watched)
    else:
        main.main()


def latencies(files: dict[str, Path]) -> dict[str, float]:
    """Return the median milliseconds of one image on one thread; the files are run in turns, 20 calls each."""
    import numpy as np

    from kd_lightning.export import OnnxClassifier

    classifiers = {name: OnnxClassifier(file, threads=1) for name, file in files.items()}
    times: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(50):
        for name, classifier in classifiers.items():
            image = np.zeros((1, *classifier.shape), dtype=np.float32)
            for call_number in range(25):
                start = perf_counter()
                classifier(image)
                if call_number >= 5:  # the first ones find the caches full of another network
                    times[name].append(1000 * (perf_counter() - start))
    return {name: round(median(values), 5) for name, values in times.items()}


# --- what is shown


def last_lines(results: Results, folder: Path) -> list[str]:
    """Return what was gained in three lines, and where to continue."""
    accuracies, sizes, times = results["test_accuracy"], results["bytes"], results["latency_ms"]
    alone, distilled = (100 * mean(accuracies[name]) for name in ("alone", "distilled"))
    gains = [100 * (after - before) for before, after in zip(accuracies["alone"], accuracies["distilled"], strict=True)]
    low, high = interval(gains)
    (large, small), (slow, fast) = ([of[name] for name in ("teacher", "distilled")] for of in (sizes, times))
    commands = Path(sys.prefix, "bin")
    commands = commands.relative_to(Path.cwd()) if commands.is_relative_to(Path.cwd()) else commands
    return [
        f"Accuracy  {alone:.1f}% alone, {distilled:.1f}% distilled: {mean(gains):+.1f} points "
        f"(95% interval {low:+.1f} to {high:+.1f}, {len(gains)} seeds)",
        f"Size      {large / 1e6:.3f} MB teacher, {small / 1e6:.3f} MB student: {large / small:.0f} times smaller",
        f"Latency   {slow:.3f} ms teacher, {fast:.3f} ms student: {slow / fast:.1f} times faster",
        "",
        f"The report       {(folder / 'report' / 'index.html').resolve().as_uri()}",
        f"The curves       {commands / 'tensorboard'} --logdir {folder}",
        f"Your own images  {commands / 'kd-lightning'} {OWN_IMAGES}",
    ]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% interval of a mean over independent runs (Student's t)."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def in_per_cent(accuracies: Sequence[float]) -> str:
    """Return accuracies as shown behind a bar."""
    return " ".join(f"{100 * value:.1f}%" for value in accuracies)


@contextmanager
def stage(console: Console, title: str, total: int) -> Iterator[Advance]:
    """Show a line with a bar."""
    columns = TextColumn(f"{title:<30}"), BarColumn(30), TextColumn("{task.description}")
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        yield lambda steps, text: progress.update(task, advance=steps, description=text)


@contextmanager
def all_output_in(log: Path) -> Iterator[Console]:
    """Write all output of this process into a file, also that of libraries in C++; yields the terminal.

    After an error, the last lines of the file are printed, and the process exits with 1.
    """
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    failed = True
    with log.open("a") as file, os.fdopen(kept[0], "w", closefd=False) as terminal:
        try:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            yield Console(file=terminal, width=None if terminal.isatty() else 100)
            failed = False
        except (Exception, SystemExit) as error:
            print(error, flush=True)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, before in enumerate(kept, 1):
                os.dup2(before, stream)
                os.close(before)
    if failed:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
        print(*last, f"All output is in {log}.", sep="\n", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
