"""Labels: class indices or probabilities, rows that have none, and logits with and without the labelled class."""

import torch
import torch.nn.functional as F
from torch import Tensor


def class_indices(labels: Tensor) -> Tensor:
    """Return class indices ``(B,)``, -1 where unlabelled: the labels themselves, or the most probable classes.

    Args:
        labels: Class indices ``(B,)``, or class probabilities ``(B, C)``, with rows of -1 where unlabelled.

    Example:
        >>> class_indices(torch.tensor([[0.2, 0.8], [-1.0, -1.0]]))
        tensor([ 1, -1])
    """
    if not labels.is_floating_point():
        return labels
    highest, classes = labels.max(1)
    return torch.where(highest >= 0, classes, -1)


def label_column(labels: Tensor) -> Tensor:
    """Return class indices as a column ``(B, 1)`` to gather by; unlabelled rows get class 0."""
    return labels.clamp(min=0).long()[:, None]


def mean_of_labelled(rows: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of ``(B,)`` values over the labelled rows, 0 where there are none.

    Args:
        rows: A value of each row, ``(B,)``.
        labels: Class indices ``(B,)``, -1 where unlabelled.

    Example:
        >>> mean_of_labelled(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([2, 0, -1]))
        tensor(2.)
    """
    labelled = labels >= 0
    return torch.where(labelled, rows, 0.0).sum() / labelled.sum().clamp(min=1)


def other_classes(logits: Tensor, label: Tensor) -> Tensor:
    """Return the logits ``(B, C - 1)`` of all classes except one in each row.

    Args:
        logits: ``(B, C)``.
        label: The class that is left out, ``(B, 1)``.

    Example:
        >>> other_classes(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([[0], [1]]))
        tensor([[2., 3.],
                [4., 6.]])
    """
    columns = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, columns + (columns >= label))


def class_or_not(logits: Tensor, label: Tensor) -> Tensor:
    """Return the log-probabilities ``(B, 2)`` of one class in each row, and of not that class.

    Args:
        logits: ``(B, C)``.
        label: The class, ``(B, 1)``.

    Example:
        >>> class_or_not(torch.zeros(1, 4), torch.tensor([[2]])).exp()
        tensor([[0.2500, 0.7500]])
    """
    rest = other_classes(logits, label).logsumexp(1, keepdim=True)
    return F.log_softmax(torch.cat([logits.gather(1, label), rest], dim=1), dim=1)


def label_cross_entropy(student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
    """Return the student's cross-entropy with a class, weighted by the teacher's probability of it, ``(B,)``.

    Args:
        student: Logits ``(B, C)``.
        teacher: Logits ``(B, C)``.
        label: The class, ``(B, 1)``.

    Example:
        >>> label_cross_entropy(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[0]]))
        tensor([0.3466])
    """
    probability = teacher.softmax(1).gather(1, label)
    return -(probability * student.log_softmax(1).gather(1, label)).squeeze(1)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher, student) of each row of two tensors of log-probabilities, ``(B,)``."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
