"""Compare the losses where labels are few: one teacher and one student, each method by its recipe, one seed.

Digits of scikit-learn, of which five a class are labelled for the student; the teacher has learned from all labels. The
student trains on all images with the same number of steps whatever the loss: on the labelled ones the losses of labels
count, on the others the teacher's alone. "alone" is the student on the labelled images only. Each run keeps the epoch
with the best accuracy on the validation images, whose labels are all there; the test images are read once, afterwards.

Losses that read labels have little to do on unlabelled images: `--labelled_only` trains on the labelled ones alone.

    python scripts/compare_losses.py [--folder lightning_logs/losses] [--methods nkd wkd_l] [--labelled_only]
        [--seed 0]

Finished runs are kept: the same command continues where it was interrupted. It prints a table, and writes results.json.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks this small are slower with more

FEW = ["--data.labels_per_class=5"]
EPOCHS = ["--trainer.max_epochs=60"]
ALONE = [*FEW, "--data.labelled_only=true", "--trainer.max_epochs=1020", "--trainer.check_val_every_n_epoch=17"]
WITHOUT_LOSSES = ("teacher", "student", "ema", "born_again", "prune", "qat")
"""Recipes that are no loss, or whose teacher is another one."""


class Row(NamedTuple):
    """Accuracies of a run on the validation and on the test images."""

    val: float
    test: float


def main() -> None:
    """Train and test what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("lightning_logs/losses"), help="folder of the runs")
    parser.add_argument("--methods", nargs="+", help="names of recipes; all by default")
    parser.add_argument("--labelled_only", action="store_true", help="train on the labelled images alone")
    parser.add_argument("--seed", type=int, default=0)
    options, more = parser.parse_known_args()
    rows = {}
    teacher = options.folder / "teacher"
    rows["teacher"] = run("teacher", teacher, ["--trainer.max_epochs=30", *more], options.seed)
    rows["alone"] = run("student", options.folder / "alone", [*ALONE, *more], options.seed)
    images, folder = (
        (ALONE, options.folder / "labelled") if options.labelled_only else ([*FEW, *EPOCHS], options.folder)
    )
    for method in options.methods or methods():
        taught = [] if method == "uskd" else ["--teacher", str(teacher / "run")]
        rows[method] = run(method, folder / method, [*images, *taught, *more], options.seed)
        (folder / "results.json").write_text(json.dumps({k: row._asdict() for k, row in rows.items()}, indent=1))
    print(table(rows))


def methods() -> list[str]:
    """Return the recipes on digits that are a loss, Hinton's first."""
    from kd_lightning.recipes import recipe_names

    names = [name.removeprefix("digits/") for name in recipe_names() if name.startswith("digits/")]
    losses = [name for name in names if name not in WITHOUT_LOSSES]
    return ["distill", *(name for name in losses if name != "distill")]


def run(recipe: str, folder: Path, arguments: list[str], seed: int) -> Row:
    """Train and test a network, unless that was done; return its accuracies."""
    from kd_lightning.runs.run import Run

    log = "--trainer.logger.init_args"
    where = [f"{log}.save_dir={folder.parent}", f"{log}.name={folder.name}", f"{log}.version=run"]
    place = folder / "run"
    if not (place.exists() and Run(place).test):
        quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
        seeds = [f"--seed_everything={seed}", f"--data.seed={seed}", "--data.split_seed=0"]
        resume = ["--ckpt_path", "auto"] if place.exists() else []
        call(["fit", "-c", f"digits/{recipe}", *seeds, *where, *arguments, *quiet, *resume], folder)
        call(["test", "-c", str(place)], folder)
    fit, test = Run(place).fit, Run(place).test
    assert fit is not None
    assert test is not None
    return Row(float(fit["val"]["accuracy"]), float(test["accuracy"]))


def call(words: list[str], folder: Path) -> None:
    """Run a command of `kd-lightning`, whose output goes into a file of the folder.

    Raises:
        SystemExit: If it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        code = subprocess.run([sys.executable, "-m", "kd_lightning", *words], stdout=log, stderr=log).returncode
    if code:
        sys.exit(f"kd-lightning {' '.join(words)} failed with {code}; its output is in {folder / 'log.txt'}.")


def table(rows: dict[str, Row]) -> str:
    """Return a table in Markdown, ordered by the accuracy on the validation images."""
    alone, kd = rows["alone"], rows.get("distill")
    lines = ["| method | val | test | test, above alone | test, above KD |", "|---|---|---|---|---|"]
    for name, row in sorted(rows.items(), key=lambda item: -item[1].val):
        above_kd = "" if kd is None or name in ("teacher", "alone") else f"{100 * (row.test - kd.test):+.1f}"
        above = "" if name in ("teacher", "alone") else f"{100 * (row.test - alone.test):+.1f}"
        lines.append(f"| {name} | {row.val:.1%} | {row.test:.1%} | {above} | {above_kd} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
