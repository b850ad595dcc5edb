"""Measures the outputs of a model for the test images, and its speed."""

from collections.abc import Callable, Sequence
from math import nan
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from kd_lightning.callbacks.label_scores import resampled_map
from kd_lightning.data.labels import is_labelled
from kd_lightning.errors import UserError
from kd_lightning.files.progress import progress
from kd_lightning.modules.evaluation import Evaluation
from kd_lightning.modules.label_evaluation import LabelEvaluation
from kd_lightning.report.metrics import Metrics
from kd_lightning.report.model import Floats, Model


def measure(
    model: Model,
    images: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None,
    teacher_thresholds: Sequence[float] | None = None,
) -> Metrics:
    """Run a model on all images, and repeatedly on a few of them.

    Args:
        model: The model.
        images: Floats in [0, 1], ``(N, channels, H, W)``.
        labels: Class indices ``(N,)``, -1 where unlabelled; or 1 for each class of an image and 0 for the others,
            ``(N, C)``, with rows of -1 where unlabelled.
        teacher_logits: Logits ``(N, C)`` to compare with; ``None`` for the model's own.
        teacher_thresholds: Their thresholds, where an image may have several classes.
    """
    parts = []
    with progress(f"Running {model.name}", len(images)) as advance:
        for part in images.split(64):
            parts.append(model.classify(part.numpy()))
            advance(len(part))
    logits = torch.from_numpy(np.concatenate(parts))
    reference, cuts = (logits, model.thresholds) if teacher_logits is None else (teacher_logits, teacher_thresholds)
    low, middle, high = (len(images[:64]) / seconds for seconds in _seconds(model.classify, images[:64].numpy()))
    latency, throughput = _seconds(model.classify, images[:1].numpy()), (high, middle, low)
    if labels.dim() == 2:
        return _measure_several(logits, labels, reference, (model.thresholds, cuts), latency, throughput)
    evaluation = Evaluation(logits.shape[1])
    evaluation.update(logits, labels, reference)
    computed = evaluation.compute()
    labelled = int((labels >= 0).sum())
    correct = int(((logits.argmax(1) == labels) & (labels >= 0)).sum())
    return Metrics(
        logits=logits,
        accuracy=correct / labelled,
        interval=_wilson_interval(correct, labelled),
        ece=float(computed["ece"]),
        agreement=float(computed["agreement"]),
        latency=latency,
        throughput=throughput,
        confusion=computed["confusion"],
    )


def _measure_several(
    logits: Tensor,
    labels: Tensor,
    reference: Tensor,
    thresholds: tuple[Sequence[float] | None, Sequence[float] | None],
    latency: tuple[float, float, float],
    throughput: tuple[float, float, float],
) -> Metrics:
    """Return the metrics of images that may have several classes, at the thresholds of the model and the reference."""
    evaluation = LabelEvaluation(logits.shape[1])
    evaluation.update(logits, labels, reference)
    computed, scores, _ = evaluation.compute(*thresholds)
    if "map" not in computed:
        raise UserError("No test image has a class, so there is nothing to measure; label some.")
    rows = is_labelled(labels)
    low, high = resampled_map(logits[rows], labels[rows]).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return Metrics(
        logits=logits,
        accuracy=float(computed["map"]),
        interval=(low, high),
        ece=nan,
        agreement=float(computed["agreement"]),
        latency=latency,
        throughput=throughput,
        confusion=None,
        scores=scores,
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
