"""Choose the settings of the quickstart's student alone by its accuracy on validation images; no test image is read.

OMP_NUM_THREADS=1 python scripts/quickstart_choice.py --folder FOLDER     # writes FOLDER/choice.json, prints a table

Each setting is tried with two seeds, the best of them and that of the recipe with five more. Teacher and distilled
student keep the settings of their recipes.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TypedDict

import quickstart

SEEDS = (100, 101)
MORE_SEEDS = (0, 1, 2, 3, 4)
SETTINGS = [
    *((0.1, decay, 1020) for decay in (5e-4, 5e-3, 2e-2, 5e-2)),
    *((0.3, decay, 1020) for decay in (5e-4, 5e-3, 2e-2)),
    *((1.0, decay, 1020) for decay in (2e-2, 5e-3)),
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
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True)
    rows = [_row(folder, *setting, SEEDS) for setting in SETTINGS]
    for place in {0, best(rows)}:
        rows[place]["val_accuracy"] += _row(folder, *SETTINGS[place], MORE_SEEDS)["val_accuracy"]
    (folder / "choice.json").write_text(f"{json.dumps(rows, indent=1)}\n")
    print(table(rows))


def best(rows: Sequence[Row]) -> int:
    """Return the number of the best setting of those with the most seeds, the first of equal ones."""
    most = max(len(row["val_accuracy"]) for row in rows)
    means = [round(mean(row["val_accuracy"]), 4) if len(row["val_accuracy"]) == most else 0.0 for row in rows]
    return means.index(max(means))


def _row(folder: Path, rate: float, decay: float, steps: int, seeds: Sequence[int]) -> Row:
    values = [accuracy(folder, rate, decay, steps, seed=seed) for seed in seeds]
    return {"learning_rate": rate, "weight_decay": decay, "steps": steps, "val_accuracy": values}


def accuracy(folder: Path, rate: float, decay: float, steps: int, *, seed: int) -> float:
    """Train a student alone; return the accuracy of its best epoch on the validation images."""
    from kd_lightning.callbacks.gap_closed import best_val_accuracy

    place = quickstart.run_folder(folder, f"alone_{rate}_{decay}_{steps}", seed)
    command = quickstart.fit_command("alone", place, seed, place)
    command += [f"--model.learning_rate={rate}", f"--model.weight_decay={decay}", f"--trainer.max_epochs={steps}"]
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
