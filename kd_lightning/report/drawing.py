"""Draws the pictures of a report, as SVG."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from kd_lightning.data.labels import is_labelled
from kd_lightning.report.metrics import Metrics
from kd_lightning.report.model import Model

PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000", "#999999"]  # Okabe and Ito
_SIZE = (4.0, 3.2)
"""Inches, without the legend: as wide as a phone, so that its text is not made smaller there."""
_ACCURACY = ("val/accuracy", "validation accuracy")
_LINE = 44
"""Characters in a line of the legend."""


def pareto(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Return the points that no other one beats in both, a low cost and a high value, in the order of their costs.

    Example:
        >>> pareto([3.0, 1.0, 2.0, 4.0], [0.9, 0.5, 0.4, 0.9])
        [1, 0]
    """
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i])):
        if not front or values[i] > values[front[-1]]:
            front.append(i)
    return front


def trade_off(names: Sequence[str], costs: Mapping[int, float], metrics: Sequence[Metrics], unit: str) -> str:
    """Draw accuracy against a cost, with intervals and the Pareto front.

    Args:
        names: Names of all models.
        costs: Cost by number of the model, of those to draw; a model has one colour in all pictures.
        metrics: Metrics of all models.
        unit: Name of the cost, with its unit.
    """
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    accuracies = [m.accuracy * 100 for m in metrics]
    shown = list(costs)
    front = [shown[i] for i in pareto(list(costs.values()), [accuracies[i] for i in shown])]
    axes.plot(
        [costs[i] for i in front], [accuracies[i] for i in front], color="#bbbbbb", zorder=1, label="best for its cost"
    )
    for i, cost in costs.items():
        low, high = (100 * end for end in metrics[i].interval)
        spread = [[accuracies[i] - low], [high - accuracies[i]]]
        axes.errorbar(
            cost, accuracies[i], spread, fmt="o", color=PALETTE[i % len(PALETTE)], capsize=3, label=_label(names[i])
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8, rotation=45)
    axes.set_xlabel(unit)
    axes.set_ylabel(f"test {'mAP' if metrics[0].scores else 'accuracy'} (%), 95% interval")
    axes.grid(alpha=0.3)
    _legend(figure, axes)
    return svg(figure)


def curves(models: Sequence[Model]) -> dict[str, str]:
    """Draw training loss and validation accuracy (or mAP) of the runs, read from their TensorBoard files.

    Args:
        models: The models, of which those without a run are left out.

    Returns:
        SVG by caption, of what was logged.
    """
    followed = ("val/map", "validation mAP") if any(model.thresholds for model in models) else _ACCURACY
    events: dict[int, EventAccumulator] = {}
    folders: set[Path] = set()
    for number, model in enumerate(models):
        if model.run is not None and model.run.folder not in folders:
            folders.add(model.run.folder)
            events[number] = EventAccumulator(str(model.run.folder)).Reload()
    pictures = {}
    for tag, title in (("train/loss", "training loss"), followed):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        for number, found in events.items():
            if tag in found.Tags()["scalars"]:
                steps, values = zip(*((event.step, event.value) for event in found.Scalars(tag)), strict=True)
                axes.plot(steps, values, color=PALETTE[number % len(PALETTE)], label=_label(models[number].name))
        axes.set_xlabel("training step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if axes.lines:
            _legend(figure, axes)
            pictures[title] = svg(figure)
    return pictures


def reliability(names: Sequence[str], metrics: Sequence[Metrics], labels: Tensor) -> str:
    """Draw the accuracy of predictions by their confidence, in ten bins; of several classes that of each by itself."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linestyle="--", label="calibrated")
    for i, (name, m) in enumerate(zip(names, metrics, strict=True)):
        if m.scores is None:
            confidence, predicted = m.logits.softmax(1).max(1)
            right = predicted == labels
        else:
            rows = is_labelled(labels)
            confidence, right = m.logits[rows].sigmoid().flatten(), labels[rows].flatten() > 0
        bins = (confidence * 10).long().clamp(max=9)
        used = [b for b in range(10) if (bins == b).any()]
        axes.plot(
            [float(confidence[bins == b].mean()) for b in used],
            [float(right[bins == b].float().mean()) for b in used],
            marker="o",
            markersize=4,
            color=PALETTE[i % len(PALETTE)],
            label=_label(name),
        )
    several = metrics[0].scores is not None
    axes.set_xlabel("probability of a class" if several else "probability of the predicted class")
    axes.set_ylabel("fraction of images that have it" if several else "fraction that is correct")
    axes.grid(alpha=0.3)
    _legend(figure, axes)
    return svg(figure)


def _label(name: str) -> str:
    """Return a label that a legend shows, in lines that fit: it leaves out those that begin with an underscore."""
    lines = textwrap.fill(name, _LINE)
    return f" {lines}" if name.startswith("_") else lines


def _legend(figure: Figure, axes: Axes) -> None:
    """Put the legend below the axes, where it hides nothing, in two columns if its names are short."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) <= _LINE / 2 else 1
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, fontsize=9, frameon=False)
    width, height = figure.get_size_inches()
    lines = sum(label.count("\n") + 1 for label in labels) / columns
    figure.set_size_inches(width, height + 0.2 * lines)


def svg(figure: Figure) -> str:
    """Return a figure as SVG that can be embedded in a page, with its text as text."""
    with io.StringIO() as file, rc_context({"svg.fonttype": "none", "svg.hashsalt": "kd_lightning"}), torch.no_grad():
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": "kd-lightning report"})
        drawn = file.getvalue()
    return drawn[drawn.index("<svg") :]
