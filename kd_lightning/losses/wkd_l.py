"""WKD-L: the Wasserstein distance between predictions, in which confusing similar classes costs less."""

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.files.read import read_checkpoint
from kd_lightning.losses._classifier import ClassifierReference
from kd_lightning.losses._labels import class_indices, label_column, label_cross_entropy, mean_of_labelled
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss
from kd_lightning.losses.wkd_cost import wkd_cost_fc

_EPSILON = 1e-8
"""Added as released to costs and to Sinkhorn's denominators; of the size of the kernel where the cost is near 1."""


@in_full_precision
def wkd_l_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    cost_matrix: Tensor,
    *,
    temperature: float = 2.0,
    gamma: float = 30.0,
    sinkhorn_lambda: float = 0.05,
    sinkhorn_iter: int = 10,
) -> Tensor:
    r"""Compute the label's cross-entropy, weighted by the teacher, and a Wasserstein distance of the other classes.

    .. math:: \frac{1}{B} \sum_b -p^t_{by} \log p^s_{by} + \gamma \sum_{c, d \ne y} P_{cd} M_{cd}

    with P the entropically regularized transport from the student's to the teacher's probabilities of the other
    classes, both at temperature T. Sinkhorn's iterations end with the student's marginal, so that one is exact, and
    the teacher's is approximated. The gradient runs through all iterations.

    Args:
        logits_student: ``(B, C)``, C >= 2.
        logits_teacher: ``(B, C)``.
        target: Class indices ``(B,)``, where -1 leaves a row out, or class probabilities ``(B, C)``, of which the
            largest counts.
        cost_matrix: M, the cost of confusing two classes, ``(C, C)``, see :func:`wkd_cost_fc` and
            :func:`wkd_cost_cka`.
        temperature: T > 0, of the other classes.
        gamma: Weight of the distance.
        sinkhorn_lambda: Weight of the transport's entropy, > 0: the smaller, the sharper, and the slower to converge.
        sinkhorn_iter: Iterations, >= 1.

    Returns:
        A scalar, and 0 where no row has a label.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
        >>> wkd_l_loss(student, teacher, torch.tensor([0]), 1 - torch.eye(3), temperature=1.0)
        tensor(0.9366)
    """
    target = class_indices(target)
    label = label_column(target)
    labelled = label_cross_entropy(logits_student, logits_teacher, label)
    # the label's mass is 0 on both sides, which leaves it out of every sum
    student, teacher = (
        (z / temperature).scatter(1, label, -torch.inf).softmax(1) for z in (logits_student, logits_teacher)
    )
    start = torch.full_like(student, 1 / (student.shape[1] - 1)).scatter(1, label, 0.0)
    distances = _transport_cost(student, teacher, start, cost_matrix, sinkhorn_lambda, sinkhorn_iter)
    return mean_of_labelled(labelled + gamma * distances, target)


@in_full_precision
def wkd_l_all_classes_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    cost_matrix: Tensor,
    *,
    temperature: float = 2.0,
    sinkhorn_lambda: float = 0.05,
    sinkhorn_iter: int = 10,
) -> Tensor:
    """Compute the Wasserstein distance of :func:`wkd_l_loss` between all classes, which needs no labels.

    Args:
        logits_student: ``(B, C)``.
        logits_teacher: ``(B, C)``.
        cost_matrix: Cost of confusing two classes, ``(C, C)``.
        temperature: T > 0.
        sinkhorn_lambda: Weight of the transport's entropy, > 0.
        sinkhorn_iter: Iterations, >= 1.

    Returns:
        A scalar.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
        >>> wkd_l_all_classes_loss(student, teacher, 1 - torch.eye(3), temperature=1.0)
        tensor(0.1546)
    """
    student, teacher = ((z / temperature).softmax(1) for z in (logits_student, logits_teacher))
    start = torch.full_like(student, 1 / student.shape[1])
    return _transport_cost(student, teacher, start, cost_matrix, sinkhorn_lambda, sinkhorn_iter).mean()


def _transport_cost(
    student: Tensor, teacher: Tensor, start: Tensor, cost: Tensor, entropy: float, iterations: int
) -> Tensor:
    """Return the cost ``(B,)`` of moving each row of probabilities ``(B, C)`` onto the other, by Sinkhorn's steps."""
    cost = cost.to(student).clamp(min=0) + _EPSILON
    kernel = (-cost / entropy).exp()
    rows = start
    for _ in range(iterations):
        columns = teacher / (rows @ kernel + _EPSILON)
        rows = student / (columns @ kernel.T + _EPSILON)
    return (rows @ (kernel * cost) * columns).sum(1)


class WKDLogitLoss(DistillationLoss):
    """Wasserstein distillation of logits (WKD-L): :func:`wkd_l_loss`.

    J. Lv, H. Yang, P. Li: Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation,
    NeurIPS 2024, https://arxiv.org/abs/2412.08139; authors' code: https://github.com/JiamingLv/WKD

    The costs between classes come from the teacher's classifier (:func:`wkd_cost_fc`), or from a file, for example of
    its features on training images, as published for CIFAR-100 (the README of the losses shows how it is made). They
    are read when training starts and are not in checkpoints. The released code computes the distance in float32; here
    float64 stays float64.

    Args:
        weight: Factor of the term in the weighted sum; 1 as released, beside a weight of 1 on the labels.
        temperature: T > 0, of the classes other than the label's; 8, the authors' for ResNet-32x4 to ResNet-8x4 on
            CIFAR-100 (2 on ImageNet).
        gamma: Weight of the distance; 600, the authors' for that pair (30 for ResNet-34 to ResNet-18 on ImageNet). With
            WKD-F beside it the released code lets it fall to 0 in the later epochs, which is not done here.
        sinkhorn_lambda: Weight of the transport's entropy, > 0; 0.05 as released.
        sinkhorn_iter: Iterations, >= 1; 10 as released.
        cost_matrix: Path of a file with a tensor ``"cost_matrix"`` of costs ``(C, C)``; ``None`` for the costs of the
            teacher's classifier.
        sharpen: k of :func:`wkd_cost_fc`, >= 0, of the classifier's costs; 1 as released (2 for ResNet-50 to
            MobileNetV1).
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If an argument is outside its range, the costs do not fit the classes, or the teacher has no linear
            classifier to take them from.

    Example:
        >>> from kd_lightning.networks import resnet20
        >>> student, teacher = Outputs(torch.rand(2, 10)), Outputs(torch.rand(2, 10))
        >>> loss = WKDLogitLoss()
        >>> loss.build(student, teacher, teacher_network=resnet20())
        >>> loss(student, teacher, torch.tensor([3, 1])).shape
        torch.Size([])
    """

    compares_logits = True
    multi_label = False

    def __init__(
        self,
        *,
        weight: float = 1.0,
        temperature: float = 8.0,
        gamma: float = 600.0,
        sinkhorn_lambda: float = 0.05,
        sinkhorn_iter: int = 10,
        cost_matrix: str | None = None,
        sharpen: float = 1.0,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(weight=weight, warmup_epochs=warmup_epochs)
        if not (temperature > 0 and sinkhorn_lambda > 0):
            raise UserError(
                f"temperature and sinkhorn_lambda must be above 0, got {temperature} and {sinkhorn_lambda}."
            )
        if not (gamma >= 0 and sharpen >= 0):
            raise UserError(f"gamma and sharpen must be >= 0, got {gamma} and {sharpen}.")
        if sinkhorn_iter < 1:
            raise UserError(f"sinkhorn_iter must be >= 1, got {sinkhorn_iter}.")
        self.temperature = temperature
        self.gamma = gamma
        self.sinkhorn_lambda = sinkhorn_lambda
        self.sinkhorn_iter = sinkhorn_iter
        self.cost_matrix = cost_matrix
        self.sharpen = sharpen
        # a plain attribute and no buffer, which a module that is cast to bfloat16 would round
        self.costs = torch.zeros(0, 0)

    def build(
        self,
        student: Outputs,
        teacher: Outputs,
        *,
        student_network: nn.Module | None = None,
        teacher_network: nn.Module | None = None,
    ) -> None:
        """Read the costs between classes, unless there is no teacher to train with."""
        if teacher_network is None:
            return
        classes = teacher.logits.shape[1]
        costs: object
        if self.cost_matrix is None:
            weight = ClassifierReference(teacher_network, "teacher", type(self).__name__)().weight
            costs = wkd_cost_fc(weight.detach(), sharpen=self.sharpen)
        else:
            costs = read_checkpoint(self.cost_matrix).get("cost_matrix")
        if not isinstance(costs, Tensor) or costs.shape != (classes, classes):
            found = f"{tuple(costs.shape)}" if isinstance(costs, Tensor) else f"{type(costs).__name__}"
            raise UserError(
                f"WKDLogitLoss needs a cost for each pair of the {classes} classes, a tensor ({classes}, {classes}), "
                f"got {found} from {self.cost_matrix or 'the classifier'}; compute it for these classes."
            )
        self.costs = costs

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        if not len(self.costs):
            raise RuntimeError("WKDLogitLoss has no costs yet; call build with the teacher's network first.")
        self.costs = self.costs.to(student.logits.device)
        return wkd_l_loss(
            student.logits,
            teacher.logits.detach(),
            labels,
            self.costs,
            temperature=self.temperature,
            gamma=self.gamma,
            sinkhorn_lambda=self.sinkhorn_lambda,
            sinkhorn_iter=self.sinkhorn_iter,
        )
