"""The picture of a confusion matrix."""

from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor


@rc_context({"text.parse_math": False})  # $ in a name is a dollar
def confusion_figure(counts: Tensor, *, classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix in per cent of each true class, with numbers for up to 20 classes.

    Args:
        counts: Counts ``(C, C)``, true classes in rows.
        classes: Class names in the order of the labels.
    """
    # torchmetrics' plot has one size of text, turns names away from their columns, and scales colours to each matrix
    from sklearn.metrics import ConfusionMatrixDisplay  # slow to import

    numbers = len(classes) <= 20
    side = min(max(4.0, (0.4 if numbers else 0.2) * len(classes)), 40.0)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    percentages = 100 * counts.cpu() / counts.cpu().sum(1, keepdim=True).clamp(min=1)
    ConfusionMatrixDisplay(percentages.numpy(), display_labels=classes).plot(
        ax=figure.subplots(),
        include_values=numbers,
        values_format=".0f",
        cmap="Blues",
        colorbar=False,
        xticks_rotation="vertical",
        im_kw={"vmin": 0, "vmax": 100},
    )
    return figure
