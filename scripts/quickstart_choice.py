"""Choose the settings of the quickstart's student alone by its accuracy on validation images; no test image is read.

OMP_NUM_THREADS=1 python scripts/quickstart_choice.py --folder FOLDER     # writes FOLDER/choice.json, prints a table

Teacher and distilled student keep the settings of their recipes. The seeds differ from those of the quickstart, so
its labelled images, first weights and orders were not chosen for.
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import TypedDict

import quickstart

SEEDS = (100, 101)
SETTINGS = [
    *((0.1, decay, 1020) for decay in (5e-4, 5e-3, 2e-2, 5e-2)),
    *((0.3, decay, 1020) for decay in (5e-4, 5e-3, 2e-2)),
    *((1.0, decay, 1020) for decay in (5e-3, 2e-2)),
    *((rate, 2e-2, 1020) for rate in (0.03, 3.0)),
    (0.1, 2e-2, 340),
]
"""Learning rate, weight decay, and steps, one an epoch; the first is that of the recipe."""


class Row(TypedDict):
    """A setting, and the accuracy of the best epoch of each seed."""

    learning_rate: float
    weight_decay: float
    steps: int
    val_accuracy: list[float]


def main() -> None:
    """Train with each of the settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--short", action="store_true", help="one epoch each, to try the script itself")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    rows: list[Row] = []
    for rate, decay, steps in SETTINGS:
        values = [
            accuracy(options.folder, rate, decay, steps, seed=seed, short=options.short) for seed in options.seeds
        ]
        rows.append({"learning_rate": rate, "weight_decay": decay, "steps": steps, "val_accuracy": values})
    (options.folder / "choice.json").write_text(f"{json.dumps(rows, indent=1)}\n")
    print(table(rows))


def accuracy(folder: Path, rate: float, decay: float, steps: int, *, seed: int, short: bool) -> float:
    """Train a student alone; return the accuracy of its best epoch on the validation images."""
    from kd_lightning.callbacks.gap_closed import best_val_accuracy

    place = quickstart.run_folder(folder, f"alone_{rate}_{decay}_{steps}", seed)
    command = quickstart.fit_command("alone", place, seed, place)
    command += [f"--model.learning_rate={rate}", f"--model.weight_decay={decay}", f"--trainer.max_epochs={steps}"]
    if short:
        command += ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"]
    quickstart.call(command)
    return best_val_accuracy(str(place / "checkpoints" / "best.ckpt"))


def table(rows: list[Row]) -> str:
    """Return a Markdown table."""
    lines = ["| learning rate | weight decay | steps | validation accuracy (%) | mean |", "|---:|---:|---:|---|---:|"]
    for row in rows:
        values = [100 * value for value in row["val_accuracy"]]
        each = ", ".join(f"{value:.1f}" for value in values)
        lines.append(
            f"| {row['learning_rate']:g} | {row['weight_decay']:g} | {row['steps']} | {each} | {mean(values):.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
