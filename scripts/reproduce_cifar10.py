"""Trains the networks of the README's "Results", each row over seeds: what is there is kept, what was cut goes on.

    python scripts/reproduce_cifar10.py short --weights resnet56.th --jobs 2       # ten epochs: hours on a CPU
    python scripts/reproduce_cifar10.py long -- --trainer.accelerator=gpu          # 50 and 200 epochs, for a GPU
    python scripts/reproduce_cifar10.py student_10 kd_10 --seeds 0 1 -- \
        --data=kd_lightning.ImageFolderDataModule --data.root=images               # rows by name; any data module
    python scripts/reproduce_cifar10.py short --weights resnet56.th --folder again # beside the published ones

Every run is two ordinary commands, `kd-lightning fit` and `kd-lightning test` of its best epoch on the validation
images; the test images are read once, by the second. Seeds differ in the initial weights and the order of images; the
split into training and validation images, the views of an image and the teacher are the same in all. A run's
folder, lightning_logs/published/ROW/seed=N, keeps config.yaml and metrics.json in the repository, and no weights: a run
that is published already is made again in another --folder. What follows -- goes to each fit.
`scripts/published_results.py` makes the table and the picture of them.

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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from kd_lightning.networks import read_checkpoint
from kd_lightning.whole_files import whole_file

PUBLISHED = Path("lightning_logs/published")
RESNET56 = [
    "--model.network=kd_lightning.networks.from_checkpoint",
    "--model.network.network=kd_lightning.networks.resnet56",
    "--model.network.network.shortcut=A",
    '--model.network.rename={"linear.": "fc."}',
    "--model.network.mean=[0.485, 0.456, 0.406]",
    "--model.network.std=[0.229, 0.224, 0.225]",
]
TAUGHT_BY_RESNET56 = ["--model.teacher.network=kd_lightning.networks.resnet56", "--model.teacher.network.shortcut=A"]
BLOCKS = {f"layer{i}.{k}": f"layer{i}.{4 * k}" for i in (1, 2, 3) for k in (0, 1, 2)}
EVERY_FOURTH_BLOCK = [
    "--model.student=kd_lightning.networks.from_checkpoint",
    "--model.student.network=kd_lightning.networks.resnet20",
    "--model.student.network.shortcut=A",
    f"--model.student.layers={json.dumps(BLOCKS)}",
]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        what: In words.
        recipe: A packaged recipe.
        epochs: Of the training.
        options: Of fit.
        teacher: The row of its teacher.
        alone: The row of the same student without one.
        begins: The row whose network the student begins as, or with some layers of.
        repeated: Whether it is run over several seeds.
        cache: Where the folder keeps the teacher's logits, if it does.
        stage: Rows of a lower one come first.
    """

    what: str
    recipe: str
    epochs: int
    options: tuple[str, ...] = ()
    teacher: str | None = None
    alone: str | None = None
    begins: str | None = None
    repeated: bool = False
    cache: str | None = None
    stage: int = 1


def _short(
    what: str,
    recipe: str,
    *options: str,
    begins: str | None = None,
    repeated: bool = False,
    stage: int = 1,
    cached: bool = True,
) -> Row:
    options = (*TAUGHT_BY_RESNET56, "--model.learning_rate=0.2", "--data.views=10", *options)
    cache = "resnet56_v10" if cached else None
    return Row(what, recipe, 10, options, "teacher_resnet56", "student_10", begins, repeated, cache, stage)


def _long(what: str, epochs: int, views: int | None = None, repeated: bool = False, stage: int = 3) -> Row:
    options, cache = ((), None) if views is None else ((f"--data.views={views}",), f"resnet34_v{views}")
    alone = f"student_{epochs}"
    return Row(what, "cifar10/distill", epochs, options, "teacher_resnet34", alone, None, repeated, cache, stage)


SHORT = {
    "teacher_resnet56": Row(
        "ResNet-56, published weights, 3 epochs of fine-tuning",
        "cifar10/teacher",
        3,
        (*RESNET56, "--model.learning_rate=0.02"),
        stage=0,
    ),
    "student_10": Row(
        "ResNet-20 alone", "cifar10/student", 10, ("--model.learning_rate=0.2", "--data.views=10"), repeated=True
    ),
    "kd_10": _short("KD, T = 4, alpha = 0.9", "cifar10/distill", repeated=True),
    "kd_online_10": _short("KD, the teacher asked in each step", "cifar10/distill", cached=False),
    "dkd_10": _short("DKD", "cifar10/dkd", "--model.losses.decoupled.warmup_epochs=1"),
    "dist_10": _short("DIST", "cifar10/dist"),
    "standardized_10": _short("KD on standardized logits", "cifar10/logit_standardization"),
    "kd_layers_10": _short(
        "KD, the student begins with every fourth block of the teacher",
        "cifar10/distill",
        "--model.learning_rate=0.05",
        *EVERY_FOURTH_BLOCK,
        begins="teacher_resnet56",
        repeated=True,
    ),
    "pruned_10": _short(
        "`kd_10`, half of its multiply-accumulates pruned, 10 epochs more of KD",
        "cifar10/prune",
        "--model.learning_rate=0.1",
        "--trainer.callbacks=kd_lightning.callbacks.PruneNetwork",
        "--trainer.callbacks.round_to=16",
        begins="kd_10",
        stage=2,
    ),
}
LONG = {
    "teacher_resnet34": Row("ResNet-34", "cifar10/teacher", 30, stage=0),
    "student_50": Row("ResNet-20 alone", "cifar10/student", 50, repeated=True),
    "kd_50": _long("KD, the teacher asked in each step", 50, repeated=True, stage=1),
    **{f"kd_v{v}_50": _long(f"KD, V = {v}", 50, views=v) for v in (1, 4, 16, 32)},
    "student_200": Row("ResNet-20 alone", "cifar10/student", 200, stage=4),
    "kd_200": _long("KD, the teacher asked in each step", 200, stage=4),
}
ROWS = {**SHORT, **LONG}
GROUPS = {"short": list(SHORT), "long": list(LONG)}


def main() -> None:
    """Train and test what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", choices=[*GROUPS, *ROWS], metavar="ROW", help=", ".join([*GROUPS, *ROWS]))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of rows that are run over several")
    parser.add_argument("--weights", type=Path, help="the published ResNet-56, for teacher_resnet56")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; they share the cores")
    parser.add_argument("--folder", type=Path, default=PUBLISHED, help="of the runs, lightning_logs/published")
    parser.add_argument("--epochs", type=int, help="of every run, to try the script out")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:cut])
    added = [*words[cut + 1 :], *([] if options.epochs is None else [f"--trainer.max_epochs={options.epochs}"])]
    runs = _runs(options.rows, options.seeds, options.folder)
    if any(run.name == "teacher_resnet56" and not run.done for run in runs) and options.weights is None:
        parser.error("teacher_resnet56 is trained from published weights; name their file with --weights")
    if all(run.done for run in runs):
        parser.exit(message=f"{options.folder} has all of these runs; with another --folder they are made again.\n")
    for run in _needed([run.name for run in runs if not run.done], options.folder):
        if run.done and not run.checkpoint.is_file():
            parser.error(f"{run.folder} has figures, but not {run.checkpoint.name}; train it in another --folder")
    total = sum(options.epochs or run.row.epochs for run in runs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.jobs))}
    with tqdm(total=total, unit="epoch", dynamic_ncols=True) as bar, ThreadPoolExecutor(options.jobs) as pool:
        for stage in sorted({run.row.stage for run in runs}):
            part = [run for run in runs if run.row.stage == stage]
            futures = [pool.submit(run.finish, added, options.weights, environment, bar) for run in part]
            try:
                for future in futures:
                    future.result()
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)  # those that have begun go on to their end
                sys.exit(str(error) or "Stopped; the same command goes on.")


def _names(rows: list[str]) -> list[str]:
    return [name for row in rows for name in GROUPS.get(row, [row])]


def _needed(rows: list[str], root: Path) -> list["Run"]:
    """The runs that rows or groups of them begin with: their teachers, and what becomes their student."""
    return [Run(row, 0, root) for name in _names(rows) for row in (ROWS[name].begins, ROWS[name].teacher) if row]


def _runs(rows: list[str], seeds: list[int], root: Path = PUBLISHED) -> list["Run"]:
    """The runs of rows or groups of them, with those that they need, in the order in which they are made."""
    asked = [Run(name, seed, root) for name in _names(rows) for seed in (seeds if ROWS[name].repeated else [0])]
    runs = dict.fromkeys([*asked, *_needed(rows, root)])
    return sorted(runs, key=lambda run: (run.row.stage, run.seed))


@dataclass(frozen=True)
class Run:
    """A row with a seed, in a folder of such."""

    name: str
    seed: int
    root: Path = PUBLISHED

    @property
    def row(self) -> Row:
        """What it is a run of."""
        return ROWS[self.name]

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.root / self.name / f"seed={self.seed}"

    @property
    def checkpoint(self) -> Path:
        """Its best epoch."""
        return self.folder / "checkpoints" / "best.ckpt"

    @property
    def done(self) -> bool:
        """Whether its metrics are there."""
        return (self.folder / "metrics.json").is_file()

    @property
    def epochs(self) -> int:
        """How many it has behind it."""
        last = self.folder / "checkpoints" / "last.ckpt"
        return int(read_checkpoint(last)["epoch"]) + 1 if last.is_file() else 0

    def finish(self, added: list[str], weights: Path | None, environment: dict[str, str], bar: tqdm) -> None:
        """Train, test and note the figures, as far as that was not done.

        Raises:
            RuntimeError: If a command ends with an error.
        """
        seen = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        tested = (self.folder / "test.json").is_file()
        commands = (
            [] if tested or self.done else [self._fit(added, weights), ["test", "-c", str(self.folder / "config.yaml")]]
        )
        with (self.folder / "output.log").open("a") as log:
            for command in commands:
                words = [sys.executable, "-m", "kd_lightning", *command]
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
            with whole_file(self.folder / "metrics.json") as file:
                file.write(f"{json.dumps(self._metrics(), indent=1)}\n".encode())
        epochs = len(json.loads((self.folder / "metrics.json").read_text())["val_accuracy"])
        bar.update(max(0, epochs - seen))

    def _fit(self, added: list[str], weights: Path | None) -> list[str]:
        if (self.folder / "config.yaml").is_file():
            return ["fit", "-c", str(self.folder / "config.yaml"), "--ckpt_path=auto"]
        row, log = self.row, "--trainer.logger.init_args"
        quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
        place = [f"{log}.save_dir={self.root}", f"{log}.name={self.name}", f"{log}.version={self.folder.name}"]
        data = ["--data.batch_size=128", "--data.padding=4", f"--data.seed={self.seed}", "--data.split_seed=0"]
        networks = [f"--model.network.path={weights}"] if self.name == "teacher_resnet56" else []
        if row.teacher is not None:
            networks = [f"--teacher={Run(row.teacher, 0, self.root).folder}"]
        if row.begins is not None:
            networks.append(f"--model.student.path={Run(row.begins, 0, self.root).checkpoint}")
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
        """What the table and the picture are made of, from what TensorBoard and the test wrote."""
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
        test = json.loads((self.folder / "test.json").read_text())
        return {
            "what": self.row.what,
            "teacher": self.row.teacher,
            "alone": self.row.alone,
            "val_accuracy": [round(value, 4) for _, value in sorted(curves["val/accuracy"].items())],
            "train_loss": [round(value, 4) for _, value in sorted(curves["train/loss"].items())],
            "test": {
                name: test[name] for name in ("accuracy", "ece", "agreement", "loss", "parameters") if name in test
            },
            "hours": round(seconds / 3600, 3),
            "device": _device(test["device"]),
            "torch": torch.__version__,
        }


def _device(name: str) -> str:
    if name.startswith("cuda"):
        return torch.cuda.get_device_name(0)
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
