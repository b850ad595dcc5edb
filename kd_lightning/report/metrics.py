"""The measured values of a model."""

from dataclasses import dataclass

from torch import Tensor

from kd_lightning.callbacks.label_scores import LabelScores


@dataclass(frozen=True)
class Metrics:
    """Values measured on the test images.

    Attributes:
        logits: Output for all images, ``(N, C)``.
        accuracy: Fraction of the labelled images that are classified correctly; where an image may have several
            classes, the mean average precision.
        interval: Its 95% confidence interval (Wilson; of the mean average precision the bootstrap).
        ece: Expected calibration error, 15 bins, of one class an image; otherwise NaN.
        agreement: Fraction of the images that get the teacher's label; of several classes an image, of equal decisions.
        latency: Quartiles of the seconds for one image, on one thread.
        throughput: Quartiles of the images per second in batches of 64, on one thread.
        confusion: Counts ``(C, C)``, true classes in rows, of one class an image.
        scores: Scores of each class, where an image may have several.
    """

    logits: Tensor
    accuracy: float
    interval: tuple[float, float]
    ece: float
    agreement: float
    latency: tuple[float, float, float]
    throughput: tuple[float, float, float]
    confusion: Tensor | None
    scores: LabelScores | None = None
