"""Metrics of validation and test images that may have several classes."""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.utilities import dim_zero_cat

from kd_lightning.callbacks.label_scores import NEUTRAL, LabelScores, choose_thresholds, label_scores
from kd_lightning.data.labels import is_labelled
from kd_lightning.losses import binary_soft_target_loss, binary_target_loss


class LabelEvaluation(nn.Module):
    """Average precision, F1 and loss over a data set of several classes an image, and the agreement with a teacher.

    Every row counts once, so uneven batches and several processes give the metrics of one pass over the set. Rows of
    -1 only count for the agreement, which is the fraction of equal decisions on (image, class) at a probability of 1/2.

    Args:
        num_classes: Number of classes, C.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.labelled = SumMetric()
        self.loss = MeanMetric(nan_strategy=float("nan"))
        self.agreement = MeanMetric()
        self.kl = MeanMetric(nan_strategy=float("nan"))
        self.rows = _LabelledRows(num_classes)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logits: ``(B, C)``.
            labels: 1 for each class of an image and 0 for the others, ``(B, C)``, with rows of -1 where unlabelled.
            teacher_logits: Logits ``(B, C)`` of a teacher to compare with, if there is one.
        """
        logits, labelled = logits.float(), is_labelled(labels)
        self.labelled.update(labelled.sum())
        self.rows.update(logits[labelled], labels[labelled].float())
        if labelled.any():
            self.loss.update(binary_target_loss(logits, labels), labelled.sum())
        if teacher_logits is not None:
            self.agreement.update(((logits > 0) == (teacher_logits > 0)).float())
            self.kl.update(binary_soft_target_loss(logits, teacher_logits.float(), temperature=1.0), len(labels))

    def compute(
        self, thresholds: Tensor | None = None, *, choose: bool = False
    ) -> tuple[dict[str, Tensor], LabelScores | None, Tensor | None]:
        """Return the metrics of all ranks by name, the scores of the classes, and the thresholds that were used.

        Args:
            thresholds: Probability of each class above which an image is given it, ``(C,)``; 1/2 by default.
            choose: Choose them on these images, if there are labelled ones.

        Returns:
            Metrics without those that have no data; ``None`` for scores and thresholds without a labelled image.
        """
        metrics, scores = {}, None
        if self.labelled.compute() > 0:
            logits, labels = self.rows.compute()
            if choose:
                thresholds = choose_thresholds(logits, labels)
            elif thresholds is None:
                thresholds = torch.full((logits.shape[1],), NEUTRAL, dtype=torch.float64)
            scores = label_scores(logits, labels, thresholds.to(logits.device))
            metrics = {**scores.averages, "loss": self.loss.compute()}
        if self.agreement.update_called:
            metrics["agreement"], metrics["kl"] = self.agreement.compute(), self.kl.compute()
        return metrics, scores, None if scores is None else thresholds


class _LabelledRows(Metric):
    """Keeps logits and labels of all ranks: a mean of the batches' average precisions is not that of the set."""

    full_state_update = False
    logits: list[Tensor]
    labels: list[Tensor]

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_classes = num_classes
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Keep rows, ``(n, C)`` each."""
        self.logits.append(logits)
        self.labels.append(labels)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return all rows, ``(N, C)`` each."""
        return dim_zero_cat(self.logits), dim_zero_cat(self.labels)
