"""The picture of the scores of each class where an image may have several."""

from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

from kd_lightning.callbacks.class_accuracy_figure import short_name
from kd_lightning.callbacks.label_results import LabelResult

_MOST = 20
"""Classes that are drawn."""


@rc_context({"text.parse_math": False})  # $ in a name is a dollar
def label_figure(results: Sequence[LabelResult]) -> Figure:
    """Draw average precision and F1 of each class that an image has, the lowest average precision first.

    Args:
        results: Results of the classes.
    """
    there = sorted((one for one in results if one.average_precision is not None), key=lambda one: _value(one)[0])
    rows = there[:_MOST]
    figure = Figure(figsize=(6.5, 1.2 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [100 * _value(one)[0] for one in rows], color="#9ecae1", label="average precision")
    axes.plot([100 * _value(one)[1] for one in rows], places, "|", color="#d55e00", markersize=12, label="F1")
    axes.set_yticks(places, [f"{short_name(one.name)} ({one.images})" for one in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 101)
    axes.set_xlabel("per cent")
    if rows:
        axes.legend(fontsize=7, loc="lower left")
    shown = "" if len(rows) == len(there) else f", the {len(rows)} lowest of {len(there)}"
    axes.set_title(f"Average precision and F1 of each class (number of images){shown}", fontsize=10)
    return figure


def _value(result: LabelResult) -> tuple[float, float]:
    return result.average_precision or 0.0, result.f1 or 0.0
