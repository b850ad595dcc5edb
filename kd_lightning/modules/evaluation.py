"""What is measured on validation and test images."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix

from kd_lightning.losses import hard_target_loss, soft_target_loss


class Prediction(NamedTuple):
    """Predictions for a batch, ``(B,)`` each: ids (``None`` for a plain loader), labels and their probabilities."""

    ids: Tensor | None
    labels: Tensor
    probabilities: Tensor


class Evaluation(nn.Module):
    """Accuracy, loss and calibration over a data set, and the agreement with a teacher.

    Rows are counted one by one, so uneven batches and several processes give the figures of one pass over the set.
    Rows that are labelled -1 count only for the agreement.

    Args:
        num_classes: Columns of the logits, C.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        common: dict[str, Any] = {"num_classes": num_classes, "ignore_index": -1, "validate_args": False}
        self.labelled = SumMetric()
        self.loss = MeanMetric(nan_strategy=float("nan"))
        self.agreement = MeanMetric()
        self.kl = MeanMetric(nan_strategy=float("nan"))
        self.by_label = nn.ModuleDict({"accuracy": MulticlassAccuracy(average="micro", **common)})
        if num_classes > 5:
            self.by_label["top5"] = MulticlassAccuracy(top_k=5, average="micro", **common)
        # 15 bins as in Guo et al., On Calibration of Modern Neural Networks, 2017
        self.by_label["ece"] = MulticlassCalibrationError(n_bins=15, norm="l1", **common)
        self.by_label["confusion"] = MulticlassConfusionMatrix(**common)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            logits: ``(B, C)``.
            labels: ``(B,)``, -1 where unlabelled.
            teacher_logits: ``(B, C)`` where there is a teacher to compare with.
        """
        logits = logits.float()
        labelled = (labels >= 0).sum()
        self.labelled.update(labelled)
        if labelled > 0:
            self.loss.update(hard_target_loss(logits, labels), labelled)
            # torchmetrics takes logits in [0, 1] for probabilities, and gives a confidence of 1 a bin of its own
            probabilities = logits.softmax(1).clamp(max=1 - 2**-24)
            for name, metric in self._metrics().items():
                metric.update(probabilities if name == "ece" else logits, labels)
        if teacher_logits is not None:
            same = (logits.argmax(1) == teacher_logits.argmax(1)).float()
            self.agreement.update(same)
            self.kl.update(soft_target_loss(logits, teacher_logits.float(), temperature=1.0), len(labels))

    def compute(self) -> dict[str, Tensor]:
        """The figures of all ranks by name, without those that nothing was counted for."""
        figures = {}
        if self.labelled.compute() > 0:
            figures = {name: metric.compute() for name, metric in self._metrics().items()}
            figures["loss"] = self.loss.compute()
        if self.agreement.update_called:
            figures["agreement"], figures["kl"] = self.agreement.compute(), self.kl.compute()
        return figures

    def _metrics(self) -> dict[str, Metric]:
        return cast("dict[str, Metric]", dict(self.by_label.items()))
