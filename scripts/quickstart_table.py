"""Write the README's figures of the quickstart from its results, and the picture of its curves.

OMP_NUM_THREADS=1 python scripts/quickstart.py --seeds 5 --folder lightning_logs/five
python scripts/quickstart_table.py --results lightning_logs/five --picture lightning_logs/quickstart
python scripts/quickstart_table.py                 # writes the table into README.md again from what was kept
"""

import argparse
import io
import json
import shutil
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from quickstart import Results, interval
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "lightning_logs" / "published" / "quickstart"
MARKERS = "<!-- quickstart, made by scripts/quickstart_table.py -->", "<!-- end -->"
NAMES = {"teacher": "the teacher", "alone": "the student alone", "distilled": "the student distilled"}
COLOURS = {"teacher": "C7", "alone": "C1", "distilled": "C0"}


def main() -> None:
    """Keep results, draw the picture, and write the table into README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="folder of a quickstart, whose results are kept")
    parser.add_argument("--picture", type=Path, help="folder of a quickstart, whose curves are drawn and kept")
    options = parser.parse_args()
    PUBLISHED.mkdir(parents=True, exist_ok=True)
    if options.results is not None:
        shutil.copy(options.results / "results.json", PUBLISHED)
    if options.picture is not None:
        save_small(picture(options.picture), PUBLISHED / "curves.png")
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


def picture(folder: Path) -> Figure:
    """Draw what TensorBoard shows of a quickstart: curves, the gap closed, and images of the first seed."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    curves, gap, views, classes = figure.subplots(2, 2, height_ratios=(1, 1.1)).flatten()
    for name, what in NAMES.items():
        for number, run in enumerate(sorted((folder / name).iterdir())):
            steps, values = scalars(run, "val/accuracy")
            label = what if number == 0 else None
            curves.plot(steps, 100 * values, color=COLOURS[name], linewidth=1, alpha=0.8, label=label)
    curves.set_ylim(0, 101)
    curves.legend(loc="lower right")
    for run in sorted((folder / "distilled").iterdir()):
        steps, values = scalars(run, "val/gap_closed")
        gap.plot(steps, values, color=COLOURS["distilled"], linewidth=1, alpha=0.8)
    gap.set_ylim(-1, 1.05)
    for axes, title in {curves: "val/accuracy (%)", gap: "val/gap_closed (0: alone, 1: the teacher)"}.items():
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    first = sorted((folder / "distilled").iterdir())[0]
    for axes, tag in {views: "train/views", classes: "test/per_class"}.items():
        axes.imshow(image(first, tag))
        axes.set_title(tag, fontsize=10)
        axes.axis("off")
    return figure


def save_small(figure: Figure, path: Path) -> None:
    """Save a figure with 48 colours, a third of the bytes."""
    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=80)
    Image.open(pixels).convert("RGB").quantize(48).save(path, optimize=True)


def scalars(run: Path, tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of a tag."""
    found = _events(run).Scalars(tag)
    return np.array([event.step for event in found]), np.array([event.value for event in found])


def image(run: Path, tag: str) -> np.ndarray:
    """Return the last image of a tag, uint8 ``(H, W, 3)``."""
    encoded = _events(run).Images(tag)[-1].encoded_image_string
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def _events(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


if __name__ == "__main__":
    main()
