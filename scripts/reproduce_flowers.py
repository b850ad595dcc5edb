"""Train small networks on photographs of flowers, and measure what augmentation, distillation and fine-tuning gain.

    python scripts/reproduce_flowers.py --root flowers-128 [--seeds 0 1 2] [--size 64] [--folder lightning_logs/flowers]

The root holds train/<class> and test/<class>. Each row of the table is a recipe of photos/, by the commands
`kd-lightning fit`, `test` and `predict`, in one process. Seeds differ in first weights, order and labelled images; the
split, the views, the teacher and the network that is fine-tuned are the same, so networks of one seed are pairs. The
epoch with the best accuracy on validation images is kept; test images are read when all trainings have finished.

Finished runs are kept: the same command continues where it was interrupted. It prints the tables of `flowers_table.py`,
and writes results.json and log.txt.
"""

import argparse
import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import quickstart
from quickstart import run_folder, stage

from kd_lightning.runs.commands import commands_left
from kd_lightning.runs.run import Run

NETWORK = "timm/test_resnet"
TEACHER = {"channels": [64, 96, 96, 192]}
STUDENT = {"channels": [8, 16, 16, 32], "stem_width": 8}
"""Arguments of the network of four stages with a block each, whose own channels are 32, 48, 48, 96."""
EPOCHS = {"teacher": 50, "student": 24, "teacher_crops": 40, "fine": 6}
LABELS = 65
"""Labels of each class that are kept: a tenth of the 3,245 photographs that are trained on."""


def named(option: str, arguments: Mapping[str, object]) -> tuple[str, ...]:
    """Return the words that give a network to an option of fit."""
    given = [f"--{option}.dict_kwargs.{name}={json.dumps(value)}" for name, value in arguments.items()]
    return f"--{option}={NETWORK}", *given


RATE, FINE_RATE = "--model.learning_rate=0.2", "--model.learning_rate=0.05"
ALONE = (*named("model.network", STUDENT), RATE)
DISTILLED = (*named("model.student", STUDENT), RATE, "--data.views=8")
STRONG, CROPS = "--data.augmentation.preset=strong", "--data.augmentation.preset=light"


@dataclass(frozen=True)
class Arm:
    """A row of the table.

    Attributes:
        what: Description.
        recipe: Name in photos/.
        options: Options of fit.
        length: Number of epochs, by its name in ``EPOCHS``.
        teacher: Row of the teacher, or of the network that is fine-tuned.
        few: Keep a tenth of the labels.
        labelled_only: Train only on images with a label, as many steps as on all.
        without_last: Leave out the last class.
        once: Train with seed 0 only: what others learn from is the same for all seeds.
    """

    what: str
    recipe: str
    options: tuple[str, ...]
    length: str = "student"
    teacher: str | None = None
    few: bool = False
    labelled_only: bool = False
    without_last: bool = False
    once: bool = False


ARMS = {
    "teacher": Arm("Teacher, `standard`", "teacher", (*named("model.network", TEACHER), RATE), "teacher", once=True),
    "teacher_crops": Arm(
        "Teacher, padded crops", "teacher", (*named("model.network", TEACHER), RATE, CROPS), "teacher_crops", once=True
    ),
    "crops": Arm("Student alone, padded crops", "student", (*ALONE, CROPS)),
    "alone": Arm("Student alone, `standard`", "student", ALONE),
    "distilled": Arm("Distilled, `standard`", "distill", DISTILLED, teacher="teacher"),
    "strong": Arm("Distilled, `strong`", "distill", (*DISTILLED, STRONG), teacher="teacher"),
    "crops_distilled": Arm(
        "Distilled, padded crops, from `teacher_crops`", "distill", (*DISTILLED, CROPS), teacher="teacher_crops"
    ),
    "standard_distilled": Arm(
        "Distilled, `standard`, from `teacher_crops`", "distill", DISTILLED, teacher="teacher_crops"
    ),
    "few_alone": Arm("Student alone, 10% of labels", "student", ALONE, few=True, labelled_only=True),
    "few_distilled": Arm("Distilled, 10% of labels", "distill", DISTILLED, teacher="teacher", few=True),
    "four": Arm("Student alone, four classes", "student", ALONE, without_last=True, once=True),
    "scratch": Arm("Student alone, a few epochs", "student", ALONE, "fine"),
    "fine": Arm("Fine-tuned from four classes", "finetune", (FINE_RATE,), "fine", teacher="four"),
}


@dataclass(frozen=True)
class Settings:
    """Settings that all runs share.

    Attributes:
        root: Folder of the photographs.
        folder: Folder of the runs.
        size: Height and width of images.
        batch_size: Images in a batch.
        labels: Labels of each class where a tenth is kept.
        epochs: Number of epochs by name.
        more: Further options of each fit.
    """

    root: Path
    folder: Path
    size: int = 64
    batch_size: int = 64
    labels: int = LABELS
    epochs: dict[str, int] = field(default_factory=lambda: dict(EPOCHS))
    more: tuple[str, ...] = ()

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        return sorted(folder.name for folder in (self.root / "train").iterdir() if folder.is_dir())


def main() -> None:
    """Train and test what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the photographs")
    parser.add_argument("--folder", type=Path, default=Path("lightning_logs/flowers"), help="folder of the runs")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="rows; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=64, help="height and width of images")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--labels", type=int, default=LABELS, help="labels of each class where a tenth is kept")
    parser.add_argument("--epochs", type=int, help="epochs of every run, to try out the script")
    parser.add_argument("--fit-only", action="store_true", help="do not read the test images yet")
    options, more = parser.parse_known_args()
    epochs = EPOCHS if options.epochs is None else dict.fromkeys(EPOCHS, options.epochs)
    given = (options.root.resolve(), options.folder, options.size, options.batch_size, options.labels)
    settings = Settings(*given, dict(epochs), tuple(more))
    arms = with_teachers(options.arms)
    settings.folder.mkdir(parents=True, exist_ok=True)
    with quickstart.all_output_in(settings.folder / "log.txt") as console:
        for seed in options.seeds:
            with stage(console, f"Train, seed {seed}", len(arms)) as advance:
                for name in arms:
                    advance(0, f"{name:<13}")
                    train(name, seed, settings)
                    advance(1, "")
        if options.fit_only:
            return
        with stage(console, "Test", len(arms) * len(options.seeds)) as advance:
            runs = [(name, seed) for seed in options.seeds for name in arms]
            answers = {}
            for run in runs:
                answers[run] = test(*run, settings)
                advance(1, "")
    import flowers_table

    results = {name: [answers[name, seed] for seed in options.seeds] for name in arms}
    (settings.folder / "results.json").write_text(f"{json.dumps(results, indent=1)}\n")
    print(flowers_table.tables(results))


def with_teachers(names: Sequence[str]) -> list[str]:
    """Return rows with those that they start from, each after its teacher."""
    needed = {*names, *(ARMS[name].teacher for name in names)}
    return [name for name in ARMS if name in needed]


def train(name: str, seed: int, settings: Settings) -> None:
    """Train a network, from its last checkpoint if that was interrupted, unless it is trained."""
    run = Run(place_of(settings, name, seed))
    if not (run.fit or {}).get("finished"):
        write_four_classes(settings)
        quickstart.call(commands_left(run, fit_command(name, seed, settings), test=False)[0])


def place_of(settings: Settings, name: str, seed: int) -> Path:
    """Return the folder of a run, which is that of seed 0 where others learn from it."""
    return run_folder(settings.folder, name, 0 if ARMS[name].once else seed)


def fit_command(name: str, seed: int, settings: Settings) -> list[str]:
    """Return the words that train a network."""
    arm, log, place = ARMS[name], "--trainer.logger.init_args", place_of(settings, name, seed)
    epochs, each = settings.epochs[arm.length], 1
    seed, words = 0 if arm.once else seed, list(arm.options)
    if arm.few:
        words.append(f"--data.labels_per_class={settings.labels}")
    if arm.labelled_only:
        each = steps(settings.root, settings) // (settings.labels * len(settings.classes) // settings.batch_size)
        words += ["--data.labelled_only=true", f"--trainer.check_val_every_n_epoch={each}"]
    if arm.without_last:
        words.append(f"--data.labels={(settings.folder / FOUR).resolve()}")
    if arm.recipe == "distill":
        assert arm.teacher is not None
        views = next((word.rpartition("=")[2] for word in words if word in (STRONG, CROPS)), "standard")
        logits = settings.folder / "teacher_logits" / (views if arm.teacher == "teacher" else f"{arm.teacher}_{views}")
        words += [f"--teacher={place_of(settings, arm.teacher, seed)}", f"--model.teacher_cache={logits}"]
    elif arm.teacher is not None:
        words.append(f"--model.network={json.dumps(new_head(arm.teacher, seed, settings))}")
    return [
        *("fit", "-c", f"photos/{arm.recipe}", f"--data.root={settings.root}", f"--data.image_size={settings.size}"),
        *(f"--data.batch_size={settings.batch_size}", f"--trainer.max_epochs={epochs * each}"),
        *(f"--seed_everything={seed}", f"--data.seed={seed}", "--data.split_seed=0"),
        *(f"{log}.save_dir={place.parent.parent}", f"{log}.name={place.parent.name}", f"{log}.version={place.name}"),
        *words,
        *settings.more,
    ]


def new_head(name: str, seed: int, settings: Settings) -> dict[str, object]:
    """Return a trained student with a new head for all classes, as a configuration names it."""
    classes = len(settings.classes)
    arguments = {**STUDENT, "num_classes": classes - ARMS[name].without_last}
    path = str(place_of(settings, name, seed) / "checkpoints" / "best.ckpt")
    model = {"model_name": NETWORK.removeprefix("timm/")}
    network = {"class_path": "timm.create_model", "init_args": model, "dict_kwargs": arguments}
    loaded = {
        "class_path": "kd_lightning.networks.from_checkpoint",
        "init_args": {"network": network, "path": path},
    }
    return {
        "class_path": "kd_lightning.networks.replace_head",
        "init_args": {"network": loaded, "num_classes": classes},
    }


# --- the photographs

FOUR = "without_last_class.csv"


def write_four_classes(settings: Settings) -> None:
    """List the photographs of all classes but the last in a CSV file, with their split."""
    rows = [
        (file.relative_to(settings.root).as_posix(), name, split)
        for split in ("train", "test")
        for name in settings.classes[:-1]
        for file in sorted((settings.root / split / name).iterdir())
    ]
    with (settings.folder / FOUR).open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label", "split"), *rows])


def steps(root: Path, settings: Settings) -> int:
    """Return the number of steps of an epoch of all images that are trained on: nine tenths of each class."""
    counts = [len(os.listdir(root / "train" / name)) for name in settings.classes]
    return sum(count - round(count / 10) for count in counts) // settings.batch_size


# --- the test


def test(name: str, seed: int, settings: Settings) -> dict[str, object]:
    """Test a network, unless it is tested; return its accuracies and the answers to the test images.

    Raises:
        SystemExit: If the answers do not have the accuracy of the test.
    """
    place = place_of(settings, name, seed)
    run, file = Run(place), place / "predictions.csv"
    if not file.exists():
        for command in ("test", "predict"):
            quickstart.call([command, "-c", str(place)])
    with file.open(newline="") as table:
        right = {row["image"]: row["label"] == Path(row["image"]).parent.name for row in csv.DictReader(table)}
    tested, fitted = run.test or {}, run.fit or {}
    if abs(sum(right.values()) / len(right) - tested["accuracy"]) > 1e-4:
        raise SystemExit(f"{file} does not have the accuracy of {run.test_file}; delete it.")
    return {
        "val": fitted["val"]["accuracy"],
        "test": tested["accuracy"],
        "parameters": tested["parameters"],
        "seconds": fitted["cost"]["seconds"],
        "right": "".join(str(int(right[name])) for name in sorted(right)),
    }


if __name__ == "__main__":
    main()
