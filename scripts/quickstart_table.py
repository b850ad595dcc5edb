"""Write the README's figures of the quickstart from its results (the picture: tensorboard_picture.py).

OMP_NUM_THREADS=1 python scripts/quickstart.py --seeds 5 --folder lightning_logs/five
python scripts/quickstart_table.py --results lightning_logs/five
python scripts/quickstart_table.py                 # writes the table into README.md again from what was kept
"""

import argparse
import json
import shutil
from pathlib import Path
from statistics import mean, stdev

from quickstart import Results, interval

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "lightning_logs" / "published" / "quickstart"
MARKERS = "<!-- quickstart, made by scripts/quickstart_table.py -->", "<!-- end -->"
NAMES = {"teacher": "the teacher", "alone": "the student alone", "distilled": "the student distilled"}


def main() -> None:
    """Keep results, and write the table into README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="folder of a quickstart, whose results are kept")
    options = parser.parse_args()
    PUBLISHED.mkdir(parents=True, exist_ok=True)
    if options.results is not None:
        shutil.copy(options.results / "results.json", PUBLISHED)
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(), json.loads((PUBLISHED / "results.json").read_text())))


def with_table(readme: str, results: Results) -> str:
    """Return the README with a new table between the markers."""
    return between(readme, *MARKERS, table(results))


def between(page: str, begin: str, end: str, text: str) -> str:
    """Return a page with another text between two markers."""
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}"


def table(results: Results) -> str:
    """Return a Markdown table of the networks, and a sentence with the gain."""
    lines = [
        "| network | test accuracy (%) | lowest to highest | file (MB) | latency (ms) |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, what in NAMES.items():
        values = [100 * value for value in results["test_accuracy"][name]]
        cells = [what, f"{mean(values):.1f} ± {stdev(values):.1f}", f"{min(values):.1f} to {max(values):.1f}"]
        cells += [f"{results['bytes'][name] / 1e6:.3f}", f"{results['latency_ms'][name]:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    alone, distilled = results["test_accuracy"]["alone"], results["test_accuracy"]["distilled"]
    gains = [100 * (after - before) for before, after in zip(alone, distilled, strict=True)]
    low, high = interval(gains)
    lines += [
        "",
        f"Distillation gains {mean(gains):.1f} points (95% interval {low:.1f} to {high:.1f}, Student's t over "
        f"{len(gains)} seeds; the smallest gain is {min(gains):.1f}).",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
