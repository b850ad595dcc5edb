"""Metrics of validation and test images."""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict, cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix

from kd_lightning.callbacks.label_scores import LabelScores
from kd_lightning.data.labels import check_labels
from kd_lightning.losses import hard_target_loss, soft_target_loss
from kd_lightning.losses._labels import class_indices
from kd_lightning.modules.label_evaluation import LabelEvaluation


class Prediction(NamedTuple):
    """Predictions for a batch, ``(B,)`` each: ids (``None`` for a plain loader), labels and their probabilities.

    Where an image may have several classes, labels are booleans ``(B, C)``, whether the image is given each class, and
    probabilities those of all classes, ``(B, C)``.
    """

    ids: Tensor | None
    labels: Tensor
    probabilities: Tensor


class Metrics(NamedTuple):
    """The metrics of a pass over a loader.

    Attributes:
        values: Values by name.
        confusion: Confusion matrix ``(C, C)``, if there are labels, of one class an image.
        scores: Scores of each class, if there are labels, of several classes an image.
        thresholds: Probability of each class above which an image was given it, ``(C,)``.
    """

    values: dict[str, Tensor]
    confusion: Tensor | None = None
    scores: LabelScores | None = None
    thresholds: Tensor | None = None


class LoaderEvaluations:
    """The evaluations of one epoch, one for each loader, which begin with its first batch.

    Example:
        >>> evaluations = LoaderEvaluations()
        >>> for loader in (0, 1):
        ...     evaluations.update(loader, torch.eye(3), torch.tensor([0, 1, 1]))
        >>> [round(evaluations.finish(loader).values["accuracy"].item(), 2) for loader in (0, 1)]
        [0.67, 0.67]
    """

    def __init__(self) -> None:
        self._by_loader: dict[int, Evaluation | LabelEvaluation] = {}

    def update(
        self,
        loader: int,
        logits: Tensor,
        labels: Tensor,
        teacher_logits: Tensor | None = None,
        *,
        multi_label: bool = False,
    ) -> None:
        """Add a batch of a loader; see :meth:`Evaluation.update` and :meth:`LabelEvaluation.update`.

        Args:
            loader: Number of the loader.
            logits: ``(B, C)``.
            labels: Labels of the batch.
            teacher_logits: Logits ``(B, C)`` of a teacher to compare with, if there is one.
            multi_label: Whether an image may have several classes.

        Raises:
            UserError: If a label is not a class.
        """
        num_classes = logits.shape[1]
        check_labels(labels, num_classes=num_classes, multi_label=multi_label)
        if loader not in self._by_loader:
            kind = LabelEvaluation if multi_label else Evaluation
            self._by_loader[loader] = kind(num_classes).to(logits.device)
        self._by_loader[loader].update(logits, labels, teacher_logits)

    def finish(
        self,
        loader: int = 0,
        *,
        thresholds: Sequence[float] | None = None,
        teacher_thresholds: Sequence[float] | None = None,
        choose_thresholds: bool = False,
    ) -> Metrics:
        """Return a loader's metrics of all ranks, and begin again: a metric lives in one mode, inference or not.

        Args:
            loader: Number of the loader.
            thresholds: Probability of each class above which an image is given it, where it may have several.
            teacher_thresholds: Those of the teacher whose logits were added.
            choose_thresholds: Choose them on these images.
        """
        if loader not in self._by_loader:
            return Metrics({})
        evaluation = self._by_loader.pop(loader)
        if isinstance(evaluation, LabelEvaluation):
            found = evaluation.compute(thresholds, teacher_thresholds, choose=choose_thresholds)
            return Metrics(found.values, scores=found.scores, thresholds=found.thresholds)
        values = evaluation.compute()
        return Metrics(values, values.pop("confusion", None))

    def clear(self) -> None:
        """Forget what was not finished."""
        self._by_loader = {}


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
