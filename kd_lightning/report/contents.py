"""What a report says of its models: rows, pictures, files."""

from math import inf
from pathlib import Path

from matplotlib import rc_context
from torch import Tensor

from kd_lightning.files.atomic import atomic_write
from kd_lightning.report import drawing
from kd_lightning.report.measuring import Figures
from kd_lightning.report.model import Model
from kd_lightning.report.page import html, markdown

HEAD = [
    "model",
    "runtime",
    "parameters",
    "MACs (M)",
    "size (MB)",
    "test accuracy (%)",
    "ECE",
    "agreement (%)",
    "latency (ms)",
    "images/s",
    "smaller",
    "faster",
]
_LOW_IS_BEST, _HIGH_IS_BEST = (2, 3, 4, 6, 8), (5, 7, 9)


def row(model: Model, f: Figures, lead: Model, base: Figures) -> list[str]:
    """A line of the table, under the titles of ``HEAD``."""
    size, whole = model.size, lead.size
    low, middle, high = (1000 * seconds for seconds in f.latency)
    slow, usual, quick = f.throughput
    return [
        model.name,
        "\n".join(model.runtime.rsplit(" ", 1)),
        f"{model.parameters:,}",
        "-" if model.macs is None else f"{model.macs / 1e6:.2f}",
        f"{size / 1e6:.3f}",
        f"{100 * f.accuracy:.2f}\n{100 * f.interval[0]:.1f} to {100 * f.interval[1]:.1f}",
        f"{f.ece:.3f}",
        f"{100 * f.agreement:.2f}",
        f"{middle:.3f}\n{low:.3f} to {high:.3f}",
        f"{usual:,.0f}\n{slow:,.0f} to {quick:,.0f}",
        f"{whole / size:.1f}x",
        f"{base.latency[1] / f.latency[1]:.1f}x" if model.runtime == lead.runtime else "-",
    ]


@rc_context({"text.parse_math": False})  # $ in a name is a dollar
def all_pictures(
    models: list[Model], figures: list[Figures], images: Tensor, labels: Tensor
) -> dict[str, dict[str, str]]:
    """SVG by title, by section of the page."""
    names = [model.name for model in models]
    sizes, times = [m.size / 1e6 for m in models], [1000 * f.latency[1] for f in figures]
    pictures = {
        "Accuracy against cost": {
            "accuracy and size": drawing.trade_off(names, sizes, figures, "size (MB)"),
            "accuracy and latency": drawing.trade_off(names, times, figures, "latency at batch 1 (ms)"),
        }
    }
    training = drawing.curves(models)
    if training is not None:
        pictures["Training"] = {"training loss and validation accuracy": training}
    classes = models[0].classes or tuple(map(str, range(figures[0].logits.shape[1])))
    pictures["Calibration"] = {"reliability": drawing.reliability(names, figures, labels)}
    pictures["Confusion, in per cent of a class"] = {
        f"confusion of {name}": drawing.confusion(f.confusion, classes) for name, f in zip(names, figures, strict=True)
    }
    if len(models) > 1:
        pictures["Where a student differs most from the teacher"] = {
            f"disagreements of {name}": drawing.disagreements(images, labels, figures[0].logits, f.logits, classes)
            for name, f in list(zip(names, figures, strict=True))[1:]
        }
    return pictures


def write(
    folder: Path,
    title: str,
    preface: str,
    rows: list[list[str]],
    models: list[Model],
    figures: list[Figures],
    pictures: dict[str, dict[str, str]],
) -> None:
    """Put the page, its Markdown and its pictures into a folder."""
    columns: dict[int, list[float]] = {
        2: [m.parameters for m in models],
        3: [inf if m.macs is None else m.macs for m in models],
        4: [m.size for m in models],
        5: [f.accuracy for f in figures],
        6: [f.ece for f in figures],
        7: [0.0, *(f.agreement for f in figures[1:])],
        8: [f.latency[1] for f in figures],
        9: [f.throughput[1] for f in figures],
    }
    best = {c: min(range(len(rows)), key=columns[c].__getitem__) for c in _LOW_IS_BEST}
    best |= {c: max(range(len(rows)), key=columns[c].__getitem__) for c in _HIGH_IS_BEST}
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [(text, svg) for section in pictures.values() for text, svg in section.items()]
    files = {text: f"picture-{number}.svg" for number, (text, _) in enumerate(drawn, 1)}
    contents = {files[text]: svg for text, svg in drawn}
    contents["report.md"] = markdown(title, preface, HEAD, rows, pictures, files)
    contents["index.html"] = html(title, preface, HEAD, rows, best, pictures)
    for old in folder.glob("picture-*.svg"):
        old.unlink()
    for name, content in contents.items():
        with atomic_write(folder / name) as file:
            file.write(content.encode())
