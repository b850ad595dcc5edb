"""The table of reproduce_flowers.py: accuracies, paired differences with intervals, and the share of the gap recovered.

python scripts/flowers_table.py                                             # prints those that are kept
python scripts/flowers_table.py --results lightning_logs/flowers/results.json --write
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from paired_intervals import Right, difference, share
from quickstart import interval
from quickstart_table import between
from reproduce_flowers import ARMS

PAIRS = {
    "standard": ("alone", "crops"),
    "gap": ("teacher", "alone"),
    "distilled": ("distilled", "alone"),
    "strong": ("strong", "alone"),
    "crops_gap": ("teacher_crops", "crops"),
    "crops_distilled": ("crops_distilled", "crops"),
    "best": ("standard_distilled", "crops"),
    "wide_gap": ("teacher_crops", "alone"),
    "standard_distilled": ("standard_distilled", "alone"),
    "few_gap": ("teacher", "few_alone"),
    "few_distilled": ("few_distilled", "few_alone"),
    "fine": ("fine", "scratch"),
}
"""The differences that are shown: what is better, and what it is compared with."""
SHARES = {
    "distilled": "gap",
    "strong": "gap",
    "crops_distilled": "crops_gap",
    "best": "crops_gap",
    "standard_distilled": "wide_gap",
    "few_distilled": "few_gap",
}
"""The differences that are a share of another one."""
SMALLEST_GAP = 2.0
"""Points on validation images by which a teacher has to be better, so that a share means something."""


PUBLISHED = Path(__file__).parents[1] / "lightning_logs" / "published" / "flowers"
KEPT, PAGE = PUBLISHED / "results.json", PUBLISHED / "README.md"
MARKERS = "<!-- flowers, made by scripts/flowers_table.py -->", "<!-- end -->"


def main() -> None:
    """Print the tables, and keep and write them if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=KEPT, help="results.json of reproduce_flowers.py")
    parser.add_argument(
        "--write", action="store_true", help="keep the results, and write them into the README.md beside"
    )
    options = parser.parse_args()
    text = options.results.read_text()
    print(tables(json.loads(text)))
    if options.write:
        KEPT.write_text(text)
        PAGE.write_text(between(PAGE.read_text(), *MARKERS, tables(json.loads(text))))


def tables(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the accuracies and the differences as Markdown.

    Args:
        results: For each row its runs, by seed: accuracies ``val`` and ``test``, and ``right``, a string of 0 and 1.
    """
    return f"{accuracies(results)}\n\n{differences(results)}"


def accuracies(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return a Markdown table of the accuracies in per cent, of each seed and their mean."""
    lines = [
        "| row | what | parameters | val | test, each seed | test | minutes |",
        "|---|---|---:|---:|---|---:|---:|",
    ]
    for name in (name for name in ARMS if name in results):
        runs = results[name]
        each = ", ".join(f"{100 * run['test']:.1f}" for run in runs[: 1 if ARMS[name].once else None])
        val, test = (100 * mean(run[split] for run in runs) for split in ("val", "test"))
        minutes, size = mean(run["seconds"] for run in runs) / 60, runs[0]["parameters"] / 1e6
        lines.append(
            f"| `{name}` | {ARMS[name].what} | {size:.2f} M | {val:.1f} | {each} | {test:.1f} | {minutes:.1f} |"
        )
    return "\n".join(lines)


def differences(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return a Markdown table of paired differences in points, and what part of the gap to the teacher they are."""
    lines = [
        "| difference | val | test | 95%, images | 95%, seeds | share of the gap |",
        "|---|---:|---:|---|---|---|",
    ]
    for name, (better, worse) in PAIRS.items():
        if not {better, worse} <= results.keys():
            continue
        found = difference(answers(results[better]), answers(results[worse]))
        val = [gain(results, better, worse, "val", run) for run in range(len(results[better]))]
        test = [gain(results, better, worse, "test", run) for run in range(len(results[better]))]
        over_seeds = "" if len(test) < 2 else f"{interval(test)[0]:+.1f} to {interval(test)[1]:+.1f}"
        over_images = f"{found.low:+.1f} to {found.high:+.1f}"
        cells = [f"`{better}` - `{worse}`", f"{mean(val):+.1f}", f"{found.points:+.1f}", over_images, over_seeds]
        lines.append(f"| {' | '.join([*cells, share_of_gap(results, name)])} |")
    return "\n".join(lines)


def share_of_gap(results: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> str:
    """Return the part of the gap to the teacher that a difference recovers, in words where the gap is too small.

    A teacher has to be better by ``SMALLEST_GAP`` points on validation images, and on test images by twice the half of
    its interval.
    """
    gap_name = SHARES.get(name, name)
    teacher, alone = PAIRS[gap_name]
    if gap_name not in SHARES.values() or not {teacher, alone} <= results.keys():
        return ""
    val = mean(gain(results, teacher, alone, "val", run) for run in range(len(results[alone])))
    gap = difference(answers(results[teacher]), answers(results[alone]))
    if val < SMALLEST_GAP or gap.points <= 2 * gap.half_width:
        return "the gap is too small"
    if name == gap_name:
        return "100%"
    found = share(*(answers(results[row]) for row in (PAIRS[name][0], alone, teacher)))
    return f"{found.points:.0f}% ({found.low:.0f} to {found.high:.0f})"


def answers(runs: Sequence[Mapping[str, Any]]) -> Right:
    """Return which test images are right, booleans ``(seeds, images)``."""
    return np.array([[letter == "1" for letter in run["right"]] for run in runs])


def gain(results: Mapping[str, Sequence[Mapping[str, Any]]], better: str, worse: str, split: str, run: int) -> float:
    """Return the difference of two rows' accuracies of one seed, in points."""
    first, second = (float(results[name][run][split]) for name in (better, worse))
    return 100 * (first - second)


if __name__ == "__main__":
    main()
