"""The contents of a report: its first numbers, its table of models, its sections."""

from collections.abc import Sequence
from math import inf

from torch import Tensor

from kd_lightning.report.headline import headline
from kd_lightning.report.metrics import Metrics
from kd_lightning.report.model import Model, by_runtime
from kd_lightning.report.page import Page, Section, Table
from kd_lightning.report.sections import costs, details

_ECE = "calibration error"
_F1 = {"f1_micro": "F1 micro (%)", "f1_macro": "F1 macro (%)"}


def contents(models: list[Model], metrics: list[Metrics], images: Tensor, labels: Tensor, machine: str) -> Page:
    """Return all that a report shows: the numbers first, then gains against costs, then the rest.

    Args:
        models: The models, the teacher first.
        metrics: Their metrics.
        images: Test images in [0, 1], ``(N, channels, H, W)``.
        labels: Their labels ``(N,)``, -1 where unlabelled; or ``(N, C)`` of several classes an image.
        machine: Name of the processor.
    """
    lead, numbers = headline(models, metrics, len(images))
    name = "All models"
    note = "Bold is the best of a column, of times the best in each runtime. The last section explains the columns."
    sections = [
        costs(models, metrics),
        Section(name, note, tables={name: table(models, metrics)}, kind="cards"),
        *details(models, metrics, images, labels),
        Section("How this was measured", tables={"columns": explanations(models, metrics, len(images), machine)}),
    ]
    return Page("Teacher and students compared", lead, numbers, sections)


def explanations(models: list[Model], metrics: list[Metrics], images: int, machine: str) -> Table:
    """Return a table that explains the columns of the table of models.

    Args:
        models: The models, the teacher first.
        metrics: Their metrics.
        images: Number of test images.
        machine: Name of the processor.
    """
    teacher = models[0].name
    folded = (
        " Those of a .onnx file are of its convolutions and linear layers, into which batch norms are folded: slightly "
        "fewer than those of its run."
    )
    texts = {
        "model": "Name of the training run or of the exported file.",
        "runtime": "Program that runs the model.",
        "parameters": "Number of trained weights."
        + (folded if any(model.file.suffix == ".onnx" for model in models) else ""),
        "MACs (M)": "Multiplications, each with an addition, for one image, in millions: the arithmetic that it takes.",
        "size (MB)": "Size of the exported file, or of a run's weights.",
        **(_explain_one(teacher, images) if metrics[0].scores is None else _explain_several(teacher, images)),
        "latency (ms)": f"Time for one image on one thread of {machine}: median and quartiles.",
        "images/s": "Images per second on the same thread, in batches of 64: median and quartiles.",
        "smaller": f"How many times smaller than {teacher}.",
        "faster": f"How many times faster than {teacher}, by latency; - in another runtime.",
    }
    rows = [{"column": name, "meaning": text} for name, text in texts.items()]
    return Table(["column", "meaning"], rows, texts=2)


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
        lowest[_ECE] = [m.ece for m in metrics]
    highest[_measure(metrics)] = [m.accuracy for m in metrics]
    numbers = range(len(models))
    best = {name: [min(numbers, key=values.__getitem__)] for name, values in lowest.items()}
    best |= {name: [max(numbers, key=values.__getitem__)] for name, values in highest.items()}
    alike = by_runtime(models).values()
    best["latency (ms)"] = [min(group, key=lambda i: metrics[i].latency[1]) for group in alike]
    best["images/s"] = [max(group, key=lambda i: metrics[i].throughput[1]) for group in alike]
    return Table(list(rows[0]), rows, best)


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
            {_ECE: f"{metrics.ece:.3f}"}
            if metrics.scores is None
            else {title: f"{100 * _average(metrics, name):.2f}" for name, title in _F1.items()}
        ),
        "agreement (%)": f"{100 * metrics.agreement:.2f}",
        "latency (ms)": f"{middle:.3f}\n{low:.3f} to {high:.3f}",
        "images/s": f"{usual:,.0f}\n{slow:,.0f} to {fast:,.0f}",
        "smaller": f"{teacher.size / model.size:.1f}x",
        "faster": f"{speed_up:.1f}x" if model.runtime == teacher.runtime else "-",
    }


def _measure(metrics: Sequence[Metrics]) -> str:
    """Return the name of the column by which models are compared first."""
    return "test accuracy (%)" if metrics[0].scores is None else "test mAP (%)"


def _average(metrics: Metrics, name: str) -> float:
    assert metrics.scores is not None
    return float(metrics.scores.averages[name])


def _explain_one(teacher: str, images: int) -> dict[str, str]:
    return {
        "test accuracy (%)": f"Share of the {images:,} test images whose class is recognized, and its 95% interval "
        "(Wilson): the share of many more such images is most probably in it.",
        _ECE: "Mean distance between the probability that a model gives to its answers and how often these are right "
        "(ECE); 0 is best.",
        "agreement (%)": f"Share of the test images that get the class that {teacher} gives them, right or wrong.",
    }


def _explain_several(teacher: str, images: int) -> dict[str, str]:
    return {
        "test mAP (%)": f"How well the {images:,} test images that have a class are ranked before the others by its "
        "probability: mean average precision of the classes, and its 95% interval (bootstrap over the images).",
        "F1 micro (%)": "Of all decisions whether an image has a class, how many of the given ones are right and how "
        "many of the right ones are given, in one number. A model's thresholds were chosen on validation images.",
        "F1 macro (%)": "The mean of that number over the classes, however many images they have.",
        "agreement (%)": f"Share of the decisions on an image and a class that are those of {teacher}.",
    }
