"""The contents of a report: its table, its pictures, its files."""

from math import inf
from pathlib import Path

from matplotlib import rc_context
from torch import Tensor

from kd_lightning.callbacks.class_results import class_results, most_confused
from kd_lightning.callbacks.confusion_figure import confusion_figure
from kd_lightning.files.atomic import atomic_write
from kd_lightning.report import drawing
from kd_lightning.report.metrics import Metrics
from kd_lightning.report.model import Model
from kd_lightning.report.page import Table, render_html, render_markdown
from kd_lightning.report.photographs import choose_images, describe_image, photograph_svg

PHOTOGRAPHS = ("What a student gets wrong and the teacher right", "Other images on which they do not agree")
"""Sections of images."""
_READABLE = 20
"""Classes up to which a confusion matrix can be read."""
_WORST = 10
_SHOWN = 12


def table(models: list[Model], metrics: list[Metrics]) -> Table:
    """Return the table; the first model is the one that the others are compared with.

    Args:
        models: The models.
        metrics: Their metrics.
    """
    rows = [_row(model, m, models[0], metrics[0]) for model, m in zip(models, metrics, strict=True)]
    lowest: dict[str, list[float]] = {
        "parameters": [model.parameters for model in models],
        "MACs (M)": [inf if model.macs is None else model.macs for model in models],
        "size (MB)": [model.size for model in models],
        "ECE": [m.ece for m in metrics],
    }
    highest: dict[str, list[float]] = {
        "test accuracy (%)": [m.accuracy for m in metrics],
        "agreement (%)": [0.0, *(m.agreement for m in metrics[1:])],
    }
    numbers = range(len(models))
    best = {name: [min(numbers, key=values.__getitem__)] for name, values in lowest.items()}
    best |= {name: [max(numbers, key=values.__getitem__)] for name, values in highest.items()}
    alike = _by_runtime(models).values()
    best["latency (ms)"] = [min(group, key=lambda i: metrics[i].latency[1]) for group in alike]
    best["images/s"] = [max(group, key=lambda i: metrics[i].throughput[1]) for group in alike]
    return Table(list(rows[0]), rows, best)


def _by_runtime(models: list[Model]) -> dict[str, list[int]]:
    """Return the numbers of the models of each runtime, as times of two runtimes are not compared."""
    groups: dict[str, list[int]] = {}
    for number, model in enumerate(models):
        groups.setdefault(model.runtime, []).append(number)
    return groups


def _row(model: Model, metrics: Metrics, teacher: Model, teacher_metrics: Metrics) -> dict[str, str]:
    low, middle, high = (1000 * seconds for seconds in metrics.latency)
    slow, usual, fast = metrics.throughput
    low_end, high_end = metrics.interval
    speed_up = teacher_metrics.latency[1] / metrics.latency[1]
    return {
        "model": model.name,
        "runtime": "\n".join(model.runtime.rsplit(" ", 1)),
        "parameters": f"{model.parameters:,}",
        "MACs (M)": "-" if model.macs is None else f"{model.macs / 1e6:.2f}",
        "size (MB)": f"{model.size / 1e6:.3f}",
        "test accuracy (%)": f"{100 * metrics.accuracy:.2f}\n{100 * low_end:.1f} to {100 * high_end:.1f}",
        "ECE": f"{metrics.ece:.3f}",
        "agreement (%)": f"{100 * metrics.agreement:.2f}",
        "latency (ms)": f"{middle:.3f}\n{low:.3f} to {high:.3f}",
        "images/s": f"{usual:,.0f}\n{slow:,.0f} to {fast:,.0f}",
        "smaller": f"{teacher.size / model.size:.1f}x",
        "faster": f"{speed_up:.1f}x" if model.runtime == teacher.runtime else "-",
    }


@rc_context({"text.parse_math": False})  # $ in a name is a dollar
def all_pictures(
    models: list[Model], metrics: list[Metrics], images: Tensor, labels: Tensor
) -> dict[str, dict[str, str]]:
    """Return SVG by caption, by section of the page.

    Args:
        models: The models, the teacher first.
        metrics: Their metrics.
        images: Test images in [0, 1], ``(N, channels, H, W)``.
        labels: Their labels ``(N,)``.
    """
    names = [model.name for model in models]
    sizes = {number: model.size / 1e6 for number, model in enumerate(models)}
    pictures = {"Accuracy against cost": {"accuracy and size": drawing.trade_off(names, sizes, metrics, "size (MB)")}}
    for runtime, group in _by_runtime(models).items():
        times = {number: 1000 * metrics[number].latency[1] for number in group}
        drawn = drawing.trade_off(names, times, metrics, f"latency at batch 1 (ms), {runtime}")
        pictures["Accuracy against cost"][f"accuracy and latency in {runtime}"] = drawn
    training = drawing.curves(models)
    if training is not None:
        pictures["Training"] = {"training loss and validation accuracy": training}
    classes = models[0].classes or tuple(map(str, range(metrics[0].logits.shape[1])))
    pictures["Calibration"] = {"reliability": drawing.reliability(names, metrics, labels)}
    if len(classes) <= _READABLE:
        pictures["Confusion, in per cent of a class"] = {
            f"confusion of {name}": drawing.svg(confusion_figure(m.confusion, classes=classes))
            for name, m in zip(names, metrics, strict=True)
        }
    logits = [m.logits for m in metrics]
    chosen = choose_images(labels, logits[0], logits[1:], _SHOWN) if len(models) > 1 else ([], [])
    for section, numbers in zip(PHOTOGRAPHS, chosen, strict=True):
        captions = {number: describe_image(number, labels, logits, names, classes) for number in numbers}
        if captions:
            pictures[section] = {text: photograph_svg(images[number], text) for number, text in captions.items()}
    return pictures


def class_tables(models: list[Model], metrics: list[Metrics]) -> dict[str, Table]:
    """Return the accuracy of each class, and the classes that are confused most, by section of the page.

    Args:
        models: The models.
        metrics: Their metrics.
    """
    classes = models[0].classes or tuple(map(str, range(metrics[0].logits.shape[1])))
    results = [class_results(m.confusion, classes) for m in metrics]
    labels = [label for label in range(len(classes)) if results[0][label].images]
    section = "Each class, accuracy in per cent"
    if len(labels) > _READABLE:
        labels.sort(key=lambda label: min(one[label].accuracy or 0.0 for one in results))
        section, labels = (
            f"The {_WORST} of {len(labels)} classes with the lowest accuracy, in per cent",
            labels[:_WORST],
        )
    rows = [
        {
            "class": classes[label],
            "images": str(results[0][label].images),
            **{model.name: _per_cent(one[label].accuracy) for model, one in zip(models, results, strict=True)},
        }
        for label in labels
    ]
    tables = {section: Table(["class", "images", *(model.name for model in models)], rows, {})} if rows else {}
    pairs = most_confused(sum(m.confusion for m in metrics), classes, _WORST)  # type: ignore[arg-type]
    places = {name: label for label, name in enumerate(classes)}
    confused = [
        {
            "class": true,
            "taken for": predicted,
            **{
                model.name: str(int(m.confusion[places[true], places[predicted]]))
                for model, m in zip(models, metrics, strict=True)
            },
        }
        for true, predicted, *_ in pairs
    ]
    columns = ["class", "taken for", *(model.name for model in models)]
    return tables | ({"Classes that are confused most, in images": Table(columns, confused, {})} if confused else {})


def _per_cent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def write(
    folder: Path,
    title: str,
    preface: str,
    table: Table,
    pictures: dict[str, dict[str, str]],
    tables: dict[str, Table] | None = None,
) -> None:
    """Write the page, its Markdown and its pictures into a folder, in place of an earlier report's.

    Args:
        folder: Folder to write to; it is created if necessary.
        title: Plain text.
        preface: Plain text.
        table: The table.
        pictures: SVG by caption, by section.
        tables: Further tables by section.
    """
    tables = tables or {}
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [(text, svg) for section in pictures.values() for text, svg in section.items()]
    files = {text: f"picture-{number}.svg" for number, (text, _) in enumerate(drawn, 1)}
    contents = {files[text]: svg for text, svg in drawn}
    contents["report.md"] = render_markdown(title, preface, table, pictures, files, tables)
    contents["index.html"] = render_html(title, preface, table, pictures, tables, photographs=PHOTOGRAPHS)
    for old in folder.glob("picture-*.svg"):
        old.unlink()
    for name, content in contents.items():
        with atomic_write(folder / name) as file:
            file.write(content.encode())
