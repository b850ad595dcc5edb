"""Choose the settings of the quickstart's students by their accuracy on validation images; no test image is read.

OMP_NUM_THREADS=1 python scripts/quickstart_choice.py --folder FOLDER     # writes FOLDER/choice.json, prints a table

The seeds differ from those of the quickstart, so its labelled images, weights and order were not chosen for.
"""

import argparse
import json
from itertools import chain
from pathlib import Path
from statistics import mean

import quickstart

SEEDS = (100, 101)
CHOICES: dict[str, list[dict[str, float]]] = {
    "teacher": [{}],
    "alone": [
        {"model.learning_rate": rate, "model.weight_decay": decay, "trainer.max_epochs": epochs}
        for rate, decay, epochs in [
            *((0.1, decay, 1020) for decay in (5e-4, 5e-3, 2e-2, 5e-2)),
            *((rate, 2e-2, 1020) for rate in (0.03, 0.3)),
            (0.1, 2e-2, 340),
        ]
    ],
    "distilled": [{"model.learning_rate": 0.1, "model.weight_decay": decay} for decay in (5e-4, 5e-3)],
}
"""Options that are added to those of the quickstart; an epoch of the student alone is one step."""


def main() -> None:
    """Train each network with each of its choices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--short", action="store_true", help="one epoch each, to try the script itself")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    rows = [
        {"network": name, **choice, "val_accuracy": [accuracy(name, choice, seed, options) for seed in options.seeds]}
        for name, choices in CHOICES.items()
        for choice in choices
    ]
    (options.folder / "choice.json").write_text(f"{json.dumps(rows, indent=1)}\n")
    print(table(rows))


def accuracy(name: str, choice: dict[str, float], seed: int, options: argparse.Namespace) -> float:
    """Train a network; return the accuracy of its best epoch on the validation images."""
    from kd_lightning.callbacks.gap_closed import best_val_accuracy

    place = quickstart.run_folder(options.folder, "_".join([name, *map(str, choice.values())]), seed)
    teacher = quickstart.run_folder(options.folder, "teacher", seed)
    command = quickstart.fit_command(name, place, seed, teacher)
    command += [f"--{option}={value}" for option, value in choice.items()]
    if options.short:
        command += ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"]
    quickstart.call(command)
    return best_val_accuracy(str(place / "checkpoints" / "best.ckpt"))


def table(rows: list[dict[str, object]]) -> str:
    """Return a Markdown table, the mean over the seeds last."""
    names = list(dict.fromkeys(chain.from_iterable(rows)))
    lines = [[*names, "mean"], ["---"] * (len(names) + 1)]
    for row in rows:
        values: list[float] = row["val_accuracy"]  # type: ignore[assignment]
        shown = row | {"val_accuracy": ", ".join(f"{100 * value:.1f}" for value in values)}
        lines.append([*(str(shown.get(name, "")) for name in names), f"{100 * mean(values):.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
