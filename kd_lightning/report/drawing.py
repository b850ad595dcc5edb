"""Draws the pictures of a report, as SVG."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from kd_lightning.data.labels import is_labelled
from kd_lightning.report.metrics import Metrics
from kd_lightning.report.model import Model

PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000", "#999999"]  # Okabe and Ito


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
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    accuracies = [m.accuracy * 100 for m in metrics]
    shown = list(costs)
    front = [shown[i] for i in pareto(list(costs.values()), [accuracies[i] for i in shown])]
    axes.plot(
        [costs[i] for i in front], [accuracies[i] for i in front], color="#bbbbbb", zorder=1, label="Pareto front"
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
    axes.tick_params(axis="x", labelsize=7, rotation=45)
    axes.set_xlabel(unit)
    axes.set_ylabel(f"test {'mAP' if metrics[0].scores else 'accuracy'} (%), 95% interval")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return svg(figure)


def curves(models: Sequence[Model]) -> str | None:
    """Draw training loss and validation accuracy (or mAP) of the runs, read from their TensorBoard files."""
    figure = Figure(figsize=(5.6, 7.2), layout="constrained")
    followed = "val/map" if any(model.thresholds for model in models) else "val/accuracy"
    panels = dict(zip(("train/loss", followed), figure.subplots(2, 1), strict=True))
    drawn: dict[Path, str] = {}
    for model in models:
        if model.run is None or model.run.folder in drawn:
            continue
        drawn[model.run.folder] = model.name
        events = EventAccumulator(str(model.run.folder)).Reload()
        for tag, axes in panels.items():
            if tag in events.Tags()["scalars"]:
                scalars = events.Scalars(tag)
                colour = PALETTE[(len(drawn) - 1) % len(PALETTE)]
                axes.plot([e.step for e in scalars], [e.value for e in scalars], color=colour, label=_label(model.name))
    for tag, axes in panels.items():
        axes.set_xlabel("step")
        axes.set_ylabel(tag)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    return svg(figure) if any(axes.lines for axes in panels.values()) else None


def reliability(names: Sequence[str], metrics: Sequence[Metrics], labels: Tensor) -> str:
    """Draw the accuracy of predictions by their confidence, in ten bins; of several classes that of each by itself."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
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
    axes.legend(fontsize=7)
    return svg(figure)


def _label(name: str) -> str:
    """Return a label that a legend shows: it leaves out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def svg(figure: Figure) -> str:
    """Return a figure as SVG that can be embedded in a page, with its text as text."""
    with io.StringIO() as file, rc_context({"svg.fonttype": "none", "svg.hashsalt": "kd_lightning"}), torch.no_grad():
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": "kd-lightning report"})
        drawn = file.getvalue()
    return drawn[drawn.index("<svg") :]
