"""Metrics of validation and test images."""

from typing import NamedTuple, TypedDict, cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix

from kd_lightning.data.labels import check_labels, class_indices
from kd_lightning.losses import hard_target_loss, soft_target_loss


class Prediction(NamedTuple):
    """Predictions for a batch, ``(B,)`` each: ids (``None`` for a plain loader), labels and their probabilities."""

    ids: Tensor | None
    labels: Tensor
    probabilities: Tensor


class _Common(TypedDict):
    num_classes: int
    ignore_index: int
    validate_args: bool


class Evaluation(nn.Module):
    """Accuracy, loss and calibration over a data set, and the agreement with a teacher.

    Every row counts once, so uneven batches and several processes give the metrics of one pass over the set. Rows
    labelled -1 only count for the agreement.

    Args:
        num_classes: Number of classes, C.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        common: _Common = {"num_classes": num_classes, "ignore_index": -1, "validate_args": False}
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
        """Add a batch.

        Args:
            logits: ``(B, C)``.
            labels: Class indices ``(B,)``, -1 where unlabelled, or class probabilities ``(B, C)``, of which the most
                probable class counts for all metrics but the loss.
            teacher_logits: Logits ``(B, C)`` of a teacher to compare with, if there is one.
        """
        logits = logits.float()
        classes = class_indices(labels)
        labelled = (classes >= 0).sum()
        self.labelled.update(labelled)
        if labelled > 0:
            self.loss.update(hard_target_loss(logits, labels), labelled)
            # torchmetrics takes logits in [0, 1] for probabilities, and gives a confidence of 1 a bin of its own
            probabilities = logits.softmax(1).clamp(max=1 - 2**-24)
            for name, metric in self._metrics().items():
                metric.update(probabilities if name == "ece" else logits, classes)
        if teacher_logits is not None:
            same = (logits.argmax(1) == teacher_logits.argmax(1)).float()
            self.agreement.update(same)
            self.kl.update(soft_target_loss(logits, teacher_logits.float(), temperature=1.0), len(labels))

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of all ranks by name, without those that have no data."""
        metrics = {}
        if self.labelled.compute() > 0:
            metrics = {name: metric.compute() for name, metric in self._metrics().items()}
            metrics["loss"] = self.loss.compute()
        if self.agreement.update_called:
            metrics["agreement"], metrics["kl"] = self.agreement.compute(), self.kl.compute()
        return metrics

    def _metrics(self) -> dict[str, Metric]:
        return cast("dict[str, Metric]", dict(self.by_label.items()))


class SplitEvaluation:
    """The evaluation of a split, one :class:`Evaluation` for each of its loaders, created with its first batch.

    Each pass has new ones, because what is summed has the mode (``no_grad`` or ``inference_mode``) it was created in.

    Attributes:
        metrics: Metrics of the first loader in the last pass by name, the confusion matrix included.

    Example:
        >>> evaluation = SplitEvaluation()
        >>> evaluation.update(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> evaluation.update(torch.eye(3), torch.tensor([0, 1, 2]), loader=1)
        >>> {name: round(float(value), 2) for name, value in evaluation.finish().items() if "accuracy" in name}
        {'accuracy': 0.67, 'accuracy/loader_1': 1.0}
    """

    def __init__(self) -> None:
        self.metrics: dict[str, Tensor] = {}
        self._evaluations: dict[int, Evaluation] = {}

    def update(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, *, loader: int = 0) -> None:
        """Add a batch of a loader; see :meth:`Evaluation.update`.

        Raises:
            UserError: If a label is not a class.
        """
        check_labels(labels, num_classes=logits.shape[1])
        if loader not in self._evaluations:
            self._evaluations[loader] = Evaluation(logits.shape[1]).to(logits.device)
        self._evaluations[loader].update(logits, labels, teacher_logits)

    def finish(self) -> dict[str, Tensor]:
        """Return the scalar metrics of the pass, those of further loaders as ``name/loader_1``, and end it."""
        evaluations, self._evaluations = self._evaluations, {}
        computed = {loader: evaluation.compute() for loader, evaluation in evaluations.items()}
        self.metrics = computed.get(0, {})
        return {
            f"{name}/loader_{loader}" if loader else name: value  # Lightning keeps its own suffix to itself
            for loader, metrics in computed.items()
            for name, value in metrics.items()
            if name != "confusion"
        }
