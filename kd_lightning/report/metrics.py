"""The measured values of a model."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """Values measured on the test images.

    Attributes:
        logits: Output for all images, ``(N, C)``.
        accuracy: Fraction of the labelled images that are classified correctly.
        interval: 95% confidence interval of the accuracy (Wilson).
        ece: Expected calibration error, 15 bins.
        agreement: Fraction of the images that get the teacher's label.
        latency: Quartiles of the seconds for one image, on one thread.
        throughput: Quartiles of the images per second in batches of 64, on one thread.
        confusion: Counts ``(C, C)``, true classes in rows.
    """

    logits: Tensor
    accuracy: float
    interval: tuple[float, float]
    ece: float
    agreement: float
    latency: tuple[float, float, float]
    throughput: tuple[float, float, float]
    confusion: Tensor
