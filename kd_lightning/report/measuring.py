"""Measures the outputs of a model for the test images, and its speed."""

from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from kd_lightning.files.progress import progress
from kd_lightning.modules.evaluation import Evaluation
from kd_lightning.report.metrics import Metrics
from kd_lightning.report.model import Floats, Model


def measure(model: Model, images: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> Metrics:
    """Run a model on all images, and repeatedly on a few of them.

    Args:
        model: The model.
        images: Floats in [0, 1], ``(N, channels, H, W)``.
        labels: Class indices ``(N,)``, -1 where unlabelled.
        teacher_logits: Logits ``(N, C)`` to compare with; ``None`` for the model's own.
    """
    parts = []
    with progress(f"Running {model.name}", len(images)) as advance:
        for part in images.split(64):
            parts.append(model.classify(part.numpy()))
            advance(len(part))
    logits = torch.from_numpy(np.concatenate(parts))
    evaluation = Evaluation(logits.shape[1])
    evaluation.update(logits, labels, logits if teacher_logits is None else teacher_logits)
    computed = evaluation.compute()
    labelled = int((labels >= 0).sum())
    correct = int(((logits.argmax(1) == labels) & (labels >= 0)).sum())
    low, middle, high = (len(images[:64]) / seconds for seconds in _seconds(model.classify, images[:64].numpy()))
    return Metrics(
        logits=logits,
        accuracy=correct / labelled,
        interval=_wilson_interval(correct, labelled),
        ece=float(computed["ece"]),
        agreement=float(computed["agreement"]),
        latency=_seconds(model.classify, images[:1].numpy()),
        throughput=(high, middle, low),
        confusion=computed["confusion"],
    )


def _wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Return the 95% confidence interval of an accuracy (E. B. Wilson, 1927)."""
    from scipy.stats import binomtest  # slow to import

    interval = binomtest(correct, count).proportion_ci(method="wilson")
    return interval.low, interval.high


def _seconds(run: Callable[[Floats], Floats], images: Floats, total: float = 0.6) -> tuple[float, float, float]:
    """Return quartiles of the time of a call."""
    times: list[float] = []
    for _ in range(3):
        run(images)
    started = perf_counter()
    while len(times) < 7 or perf_counter() - started < total:
        start = perf_counter()
        run(images)
        times.append(perf_counter() - start)
    low, middle, high = np.quantile(times, [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)
