"""Metrics of validation and test images that may have several classes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.utilities import dim_zero_cat

from kd_lightning.callbacks.label_scores import LabelScores, choose_thresholds, decide, label_scores
from kd_lightning.data.labels import is_labelled
from kd_lightning.losses import binary_soft_target_loss, binary_target_loss
from kd_lightning.networks.data_config import thresholds_or_default


class LabelMetrics(NamedTuple):
    """The metrics of images that may have several classes.

    Attributes:
        values: Values by name.
        scores: Scores of each class, if there is a labelled image.
        thresholds: Probability of each class above which an image was given it, ``(C,)``.
    """

    values: dict[str, Tensor]
    scores: LabelScores | None
    thresholds: Tensor


class LabelEvaluation(nn.Module):
    """Average precision, F1 and loss over a data set of several classes an image, and the agreement with a teacher.

    Every row counts once, so uneven batches and several processes give the metrics of one pass over the set. Rows of
    -1 only count for the agreement, which is the fraction of equal decisions on (image, class), each network's at its
    own thresholds.

    Args:
        num_classes: Number of classes, C.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.loss = MeanMetric(nan_strategy=float("nan"))
        self.kl = MeanMetric(nan_strategy=float("nan"))
        self.rows = _Rows()

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logits: ``(B, C)``.
            labels: 1 for each class of an image and 0 for the others, ``(B, C)``, with rows of -1 where unlabelled.
            teacher_logits: Logits ``(B, C)`` of a teacher to compare with, if there is one.
        """
        logits, labelled = logits.float(), is_labelled(labels).sum()
        self.rows.update(logits, labels.float(), logits[:0] if teacher_logits is None else teacher_logits.float())
        if labelled > 0:
            self.loss.update(binary_target_loss(logits, labels), labelled)
        if teacher_logits is not None:
            self.kl.update(binary_soft_target_loss(logits, teacher_logits.float(), temperature=1.0), len(labels))

    def compute(
        self,
        thresholds: Sequence[float] | None = None,
        teacher_thresholds: Sequence[float] | None = None,
        *,
        choose: bool = False,
    ) -> LabelMetrics:
        """Return the metrics of all ranks, without those that have no data.

        Args:
            thresholds: Probability of each class above which an image is given it; 1/2 by default.
            teacher_thresholds: Those of the teacher.
            choose: Choose the thresholds on these images, if there are labelled ones.
        """
        logits, labels, teacher = self.rows.compute()
        labelled, metrics, scores = is_labelled(labels), {}, None
        used = self._as_tensor(thresholds, logits)
        if labelled.any():
            if choose:
                used = choose_thresholds(logits[labelled], labels[labelled])
            scores = label_scores(logits[labelled], labels[labelled], used)
            metrics = {**scores.averages, "loss": self.loss.compute()}
        if len(teacher):
            taught = decide(teacher, self._as_tensor(teacher_thresholds, logits))
            metrics["agreement"] = (decide(logits, used) == taught).float().mean()
            metrics["kl"] = self.kl.compute()
        return LabelMetrics(metrics, scores, used)

    def _as_tensor(self, thresholds: Sequence[float] | None, like: Tensor) -> Tensor:
        values = thresholds_or_default(thresholds, self.num_classes)
        return torch.tensor(values, dtype=torch.float64, device=like.device)


class _Rows(Metric):
    """Keeps logits and labels of all ranks: a mean of the batches' average precisions is not that of the set."""

    full_state_update = False
    logits: list[Tensor]
    labels: list[Tensor]
    teacher: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("logits", "labels", "teacher"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor, teacher: Tensor) -> None:
        """Keep rows, ``(B, C)`` each; those of the teacher may be ``(0, C)``."""
        self.logits.append(logits)
        self.labels.append(labels)
        self.teacher.append(teacher)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return all rows, ``(N, C)`` each."""
        return dim_zero_cat(self.logits), dim_zero_cat(self.labels), dim_zero_cat(self.teacher)
