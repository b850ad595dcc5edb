"""What a model does with the test images, and how long it takes."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from kd_lightning.modules.evaluation import Evaluation
from kd_lightning.report.model import Floats, Model


@dataclass
class Figures:
    """What was measured of a model.

    Attributes:
        logits: ``(N, C)``.
        accuracy: On the test images.
        interval: Its 95% interval by Wilson.
        ece: Expected calibration error, 15 bins.
        agreement: Share of images on which it answers as the teacher does.
        latency: Quartiles of seconds for one image, one thread.
        throughput: Images a second in batches of 64, one thread: quartiles.
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


def measured(model: Model, images: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> Figures:
    """Run a model on all images, and on a few again and again."""
    parts = [model.classify(part.numpy()) for part in images.split(64)]
    logits = torch.from_numpy(np.concatenate(parts))
    evaluation = Evaluation(logits.shape[1])
    evaluation.update(logits, labels, logits if teacher_logits is None else teacher_logits)
    said = evaluation.compute()
    labelled = int((labels >= 0).sum())
    right = int(((logits.argmax(1) == labels) & (labels >= 0)).sum())
    one = _seconds(model.classify, images[:1].numpy())
    many = _seconds(model.classify, images[:64].numpy())
    low, middle, high = (len(images[:64]) / seconds for seconds in many)
    return Figures(
        logits,
        right / labelled,
        _wilson_interval(right, labelled),
        float(said["ece"]),
        float(said["agreement"]),
        one,
        (high, middle, low),
        said["confusion"],
    )


def _wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Return the 95% confidence interval of an accuracy (E. B. Wilson, 1927)."""
    from scipy.stats import binomtest  # slow to import

    interval = binomtest(correct, count).proportion_ci(method="wilson")
    return interval.low, interval.high


def _seconds(run: Callable[[Floats], Floats], images: Floats, total: float = 0.6) -> tuple[float, float, float]:
    """Quartiles of the time of a run."""
    times: list[float] = []
    for _ in range(3):
        run(images)
    begun = perf_counter()
    while len(times) < 7 or perf_counter() - begun < total:
        start = perf_counter()
        run(images)
        times.append(perf_counter() - start)
    low, middle, high = np.quantile(times, [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)
