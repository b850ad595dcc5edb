"""Write the tables of lightning_logs/published/README.md and the plot of the runs that reproduce_cifar10.py left there.

python scripts/published_results.py            # prints the tables
python scripts/published_results.py --write    # writes them into that file and draws the plot
"""

import argparse
import json
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from kd_lightning.report.drawing import svg

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "lightning_logs" / "published"
PICTURE = PUBLISHED / "val_accuracy.svg"
MARKERS = "<!-- {}, made by scripts/published_results.py -->", "<!-- end -->"
RESULTS = ["row", "what", "test accuracy (%)", "lowest to highest", "gap closed", "ECE", "seeds", "hours a seed"]
SEARCH = ["row", "what", "validation accuracy (%)", "hours"]


def main() -> None:
    """Print the tables, and write them if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--write", action="store_true", help="write the tables into their README.md and draw the plot")
    group.add_argument("--folder", type=Path, default=PUBLISHED, help="folder of other runs")
    options = parser.parse_args()
    rows = published(options.folder)
    print(table(rows), search_table(rows), sep="\n\n")
    if options.write:
        readme = PUBLISHED / "README.md"
        readme.write_text(with_tables(readme.read_text(), rows))
        PICTURE.write_text(picture(rows))


def published(folder: Path = PUBLISHED) -> dict[str, list[dict[str, Any]]]:
    """Return the metrics of each row's runs, by seed; rows without a teacher first, then by number of epochs."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*/seed=*/metrics.json"), key=lambda file: (file.parts[-3], len(str(file)), file)):
        found.setdefault(file.parts[-3], []).append(json.loads(file.read_text()))
    order = sorted(found, key=lambda name: (found[name][0]["teacher"] is not None, len(found[name][0]["val_accuracy"])))
    return {name: found[name] for name in order}


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return a Markdown table; "gap closed" is the student's gain divided by the gap to the teacher."""
    lines = [RESULTS]
    for name, runs in rows.items():
        if "test" not in runs[0]:
            continue
        accuracies = [run["test"]["accuracy"] for run in runs]
        spread = f" ± {100 * stdev(accuracies):.2f}" if len(runs) > 1 else ""
        extremes = f"{100 * min(accuracies):.2f} to {100 * max(accuracies):.2f}" if len(runs) > 1 else ""
        lines.append(
            [
                f"`{name}`",
                runs[0]["what"],
                f"{100 * mean(accuracies):.2f}{spread}",
                extremes,
                _gap_closed(rows, runs),
                f"{mean(run['test']['ece'] for run in runs):.3f}",
                str(len(runs)),
                f"{mean(run['hours'] for run in runs):.2f}",
            ]
        )
    return _markdown(lines)


def search_table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return a Markdown table of the trials that selected the recipes, with the accuracy of the best epoch."""
    searched = {name: runs[0] for name, runs in rows.items() if "test" not in runs[0]}
    lines = [SEARCH]
    for name in sorted(searched):
        run = searched[name]
        lines.append([f"`{name}`", run["what"], f"{100 * max(run['val_accuracy']):.1f}", f"{run['hours']:.2f}"])
    return _markdown(lines)


def _markdown(lines: list[list[str]]) -> str:
    """Return a Markdown table from a header and rows, with the first two columns aligned to the left."""
    head, *rest = lines
    rule = ["---", "---", *["---:"] * (len(head) - 2)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *rest])


def _gap_closed(rows: dict[str, list[dict[str, Any]]], runs: list[dict[str, Any]]) -> str:
    teacher, alone = (rows.get(runs[0][role] or "") for role in ("teacher", "alone"))
    if teacher is None or alone is None:
        return ""
    floor, ceiling = (mean(run["test"]["accuracy"] for run in part) for part in (alone, teacher))
    if ceiling <= floor:
        return ""
    return f"{(mean(run['test']['accuracy'] for run in runs) - floor) / (ceiling - floor):.0%}"


def with_tables(readme: str, rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return the README with new tables between their markers."""
    for what, made in [("results", table(rows)), ("search", search_table(rows))]:
        begin, end = MARKERS[0].format(what), MARKERS[1]
        new = f"{begin}\n{made}\n{end}"
        escaped = new.replace("\\", r"\\")
        readme, found = re.subn(f"(?s){begin}.*?{end}", escaped, readme)
        if not found:
            raise ValueError(f"README.md has no {begin} for the table.")
    return readme


def picture(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return a plot (SVG) of validation accuracy by epoch, with a line for each seed of rows that have several."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    shown = [name for name, runs in rows.items() if len(runs) > 1]
    for number, name in enumerate(shown):
        for seed, run in enumerate(rows[name]):
            values = [100 * value for value in run["val_accuracy"]]
            label = f"{name}: {run['what']}" if seed == 0 else None
            axes.plot(range(1, len(values) + 1), values, color=f"C{number}", alpha=0.8, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    return svg(figure)


if __name__ == "__main__":
    main()
