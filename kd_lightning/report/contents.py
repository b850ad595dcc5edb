"""The contents of a report: its table, its pictures, its files."""

from collections.abc import Sequence
from math import inf
from pathlib import Path

from matplotlib import rc_context
from torch import Tensor

from kd_lightning.callbacks.class_results import class_results, most_confused
from kd_lightning.callbacks.confusion_figure import confusion_figure
from kd_lightning.callbacks.label_results import label_results
from kd_lightning.callbacks.label_scores import NEUTRAL
from kd_lightning.files.atomic import atomic_write
from kd_lightning.report import drawing
from kd_lightning.report.label_photographs import choose_label_images, describe_label_image
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
    }
    highest: dict[str, list[float]] = {
        "agreement (%)": [0.0, *(m.agreement for m in metrics[1:])],
    }
    for name in ("f1_micro", "f1_macro") if metrics[0].scores else ():
        highest[_F1[name]] = [_average(m, name) for m in metrics]
    if metrics[0].scores is None:
        lowest["ECE"] = [m.ece for m in metrics]
    highest[_measure(metrics)] = [m.accuracy for m in metrics]
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
        _measure([metrics]): f"{100 * metrics.accuracy:.2f}\n{100 * low_end:.1f} to {100 * high_end:.1f}",
        **(
            {"ECE": f"{metrics.ece:.3f}"}
            if metrics.scores is None
            else {title: f"{100 * _average(metrics, name):.2f}" for name, title in _F1.items()}
        ),
        "agreement (%)": f"{100 * metrics.agreement:.2f}",
        "latency (ms)": f"{middle:.3f}\n{low:.3f} to {high:.3f}",
        "images/s": f"{usual:,.0f}\n{slow:,.0f} to {fast:,.0f}",
        "smaller": f"{teacher.size / model.size:.1f}x",
        "faster": f"{speed_up:.1f}x" if model.runtime == teacher.runtime else "-",
    }


_F1 = {"f1_micro": "F1 micro (%)", "f1_macro": "F1 macro (%)"}


def _measure(metrics: Sequence[Metrics]) -> str:
    """Return the name of the column by which models are compared first."""
    return "test accuracy (%)" if metrics[0].scores is None else "test mAP (%)"


def _average(metrics: Metrics, name: str) -> float:
    assert metrics.scores is not None
    return float(metrics.scores.averages[name])


@rc_context({"text.parse_math": False})  # $ in a name is a dollar
def all_pictures(
    models: list[Model], metrics: list[Metrics], images: Tensor, labels: Tensor
) -> dict[str, dict[str, str]]:
    """Return SVG by caption, by section of the page.

    Args:
        models: The models, the teacher first.
        metrics: Their metrics.
        images: Test images in [0, 1], ``(N, channels, H, W)``.
        labels: Their labels ``(N,)``, or ``(N, C)`` of several classes an image.
    """
    names = [model.name for model in models]
    measure = "accuracy" if metrics[0].scores is None else "mean average precision"
    cost = f"{measure.capitalize()} against cost"
    sizes = {number: model.size / 1e6 for number, model in enumerate(models)}
    pictures = {cost: {f"{measure} and size": drawing.trade_off(names, sizes, metrics, "size (MB)")}}
    for runtime, group in _by_runtime(models).items():
        times = {number: 1000 * metrics[number].latency[1] for number in group}
        drawn = drawing.trade_off(names, times, metrics, f"latency at batch 1 (ms), {runtime}")
        pictures[cost][f"{measure} and latency in {runtime}"] = drawn
    training = drawing.curves(models)
    if training is not None:
        pictures["Training"] = {f"training loss and validation {measure}": training}
    classes = models[0].classes or tuple(map(str, range(metrics[0].logits.shape[1])))
    pictures["Calibration"] = {"reliability": drawing.reliability(names, metrics, labels)}
    if len(classes) <= _READABLE and metrics[0].scores is None:
        pictures["Confusion, in per cent of a class"] = {
            f"confusion of {name}": drawing.svg(confusion_figure(m.confusion, classes=classes))
            for name, m in zip(names, metrics, strict=True)
            if m.confusion is not None
        }
    logits = [m.logits for m in metrics]
    if metrics[0].scores is not None:
        return pictures | _label_photographs(models, images, labels, logits, classes)
    chosen = choose_images(labels, logits[0], logits[1:], _SHOWN) if len(models) > 1 else ([], [])
    for section, numbers in zip(PHOTOGRAPHS, chosen, strict=True):
        captions = {number: describe_image(number, labels, logits, names, classes) for number in numbers}
        if captions:
            pictures[section] = {text: photograph_svg(images[number], text) for number, text in captions.items()}
    return pictures


def _label_photographs(
    models: list[Model], images: Tensor, labels: Tensor, logits: list[Tensor], classes: tuple[str, ...]
) -> dict[str, dict[str, str]]:
    """Return the sections of images that may have several classes."""
    names, cuts = [model.name for model in models], [_thresholds(model, len(classes)) for model in models]
    chosen = choose_label_images(labels, logits, cuts, _SHOWN) if len(models) > 1 else ([], [])
    pictures = {}
    for section, numbers in zip(PHOTOGRAPHS, chosen, strict=True):
        captions = {number: describe_label_image(number, labels, logits, cuts, names, classes) for number in numbers}
        if captions:
            pictures[section] = {text: photograph_svg(images[number], text) for number, text in captions.items()}
    return pictures


def _thresholds(model: Model, count: int) -> Sequence[float]:
    return model.thresholds or (NEUTRAL,) * count


def _label_table(models: list[Model], metrics: list[Metrics], classes: tuple[str, ...]) -> dict[str, Table]:
    """Return average precision and F1 of each class where an image may have several."""
    results = [
        label_results(m.scores, classes, _thresholds(model, len(classes)))
        for model, m in zip(models, metrics, strict=True)
        if m.scores is not None
    ]
    labels = [label for label in range(len(classes)) if results[0][label].images]
    section = "Each class, average precision and F1 in per cent"
    if len(labels) > _READABLE:
        labels.sort(key=lambda label: min(one[label].average_precision or 0.0 for one in results))
        section, labels = (
            f"The {_WORST} of {len(labels)} classes with the lowest average precision, and F1, in per cent",
            labels[:_WORST],
        )
    rows = [
        {
            "class": classes[label],
            "images": str(results[0][label].images),
            **{
                model.name: f"{_per_cent(one[label].average_precision)}\nF1 {_per_cent(one[label].f1)} above "
                f"{one[label].threshold:.2f}"
                for model, one in zip(models, results, strict=True)
            },
        }
        for label in labels
    ]
    return {section: Table(["class", "images", *(model.name for model in models)], rows, {})}


def class_tables(models: list[Model], metrics: list[Metrics]) -> dict[str, Table]:
    """Return the accuracy of each class, and the classes that are confused most, by section of the page.

    Where an image may have several classes, that is average precision and F1 of each.

    Args:
        models: The models.
        metrics: Their metrics.
    """
    classes = models[0].classes or tuple(map(str, range(metrics[0].logits.shape[1])))
    if metrics[0].scores is not None:
        return _label_table(models, metrics, classes)
    confusions = [m.confusion for m in metrics if m.confusion is not None]
    results = [class_results(confusion, classes) for confusion in confusions]
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
    pairs = most_confused(sum(confusions), classes, _WORST)  # type: ignore[arg-type]
    places = {name: label for label, name in enumerate(classes)}
    confused = [
        {
            "class": true,
            "taken for": predicted,
            **{
                model.name: str(int(confusion[places[true], places[predicted]]))
                for model, confusion in zip(models, confusions, strict=True)
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
