"""The tables of the classes that `validate` and `test` print."""

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from kd_lightning.callbacks.class_results import class_results
from kd_lightning.callbacks.label_results import LabelResult
from kd_lightning.cli.tables import print_table

_ALL = 20
"""Classes up to which all are printed."""
_WORST = 10


@rank_zero_only
def print_class_table(confusion: Tensor, classes: Sequence[str]) -> None:
    """Print images, accuracy and precision of each class; of many classes those of the lowest accuracy.

    Args:
        confusion: Counts ``(C, C)``, true classes in rows.
        classes: C names.
    """
    from rich.table import Table
    from rich.text import Text

    results, title = class_results(confusion, classes), "Each class"
    if len(results) > _ALL:
        results.sort(key=lambda result: 2.0 if result.accuracy is None else result.accuracy)
        results, title = results[:_WORST], f"The {_WORST} of {len(results)} classes with the lowest accuracy"
    table = Table(title=title, title_justify="left")
    for name in ("class", "images", "accuracy", "precision", "mostly taken for"):
        table.add_column(name, justify="left" if name in ("class", "mostly taken for") else "right")
    for result in results:
        fractions = ["-" if value is None else f"{value:.1%}" for value in (result.accuracy, result.precision)]
        table.add_row(Text(result.name), str(result.images), *fractions, Text(result.taken_for))
    print_table(table)


@rank_zero_only
def print_label_table(results: Sequence[LabelResult]) -> None:
    """Print the scores of each class where an image may have several; of many classes those of the lowest precision.

    Args:
        results: Results of the classes.
    """
    from rich.table import Table
    from rich.text import Text

    shown, title = list(results), "Each class"
    if len(shown) > _ALL:
        shown.sort(key=lambda one: 2.0 if one.average_precision is None else one.average_precision)
        shown, title = shown[:_WORST], f"The {_WORST} of {len(shown)} classes with the lowest average precision"
    table = Table(title=title, title_justify="left")
    for name in ("class", "images", "average precision", "F1", "precision", "recall", "threshold"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for one in shown:
        values = one.average_precision, one.f1, one.precision, one.recall
        fractions = ["-" if value is None else f"{value:.1%}" for value in values]
        table.add_row(Text(one.name), str(one.images), *fractions, f"{one.threshold:.3f}")
    print_table(table)
