"""The interface of a distillation loss."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs


class DistillationLoss(nn.Module, ABC):
    """One term of the objective: a weight, the layers that it reads, and a function of what both networks said.

    A subclass calls a pure function in ``forward``. Parts that are learned with the student (a regressor, variances)
    are made in ``build``, which is called once before training with the outputs of a dry run.

    In domain adaptation the pair is source and target: what one network says of the images of both domains, with
    gradient on both sides. Both lists of layers are then the same, and the labels are the source's.

    Args:
        weight: What the term is multiplied by in the sum, >= 0.
        student_layers: Dotted names of the student's layers that are read.
        teacher_layers: The teacher's, pairwise; ``None`` for the same names.
        warmup_epochs: Epochs over which the weight rises linearly: epoch ``e`` (from 0) uses
            ``weight * min(1, (e + 1) / warmup_epochs)``. 0 for a constant weight.

    Raises:
        ValueError: If the weight or the warm-up is negative, or the two lists of layers differ in length.
    """

    reads_teacher_logits: bool = False
    """Whether the term compares logits, so that both networks need the same classes."""

    between_domains: bool = False
    """Whether the pair is one network's source and target, for domain adaptation, and not two networks."""

    progress: float = 0.0
    """The share of the training that is done, in [0, 1]; told by the module before each step."""

    figures: dict[str, Tensor]
    """Scalars of the last batch that are logged beside the term; they hold no graph, so that modules can be copied."""

    def __init__(
        self,
        weight: float = 1.0,
        student_layers: Sequence[str] = (),
        teacher_layers: Sequence[str] | None = None,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__()
        self.figures = {}
        if not weight >= 0:
            raise UserError(f"A loss's weight must be >= 0, got {weight}.")
        if warmup_epochs < 0:
            raise UserError(f"warmup_epochs must be >= 0, got {warmup_epochs}.")
        if isinstance(student_layers, str) or isinstance(teacher_layers, str):
            raise UserError("Layers are given as a list of names, for example ['layer3'], and not as one string.")
        self.weight = weight
        self.warmup_epochs = warmup_epochs
        self.student_layers = tuple(student_layers)
        self.teacher_layers = self.student_layers if teacher_layers is None else tuple(teacher_layers)
        if len(self.student_layers) != len(self.teacher_layers):
            raise UserError(
                f"Layers are compared in pairs, got {len(self.student_layers)} of the student "
                f"and {len(self.teacher_layers)} of the teacher."
            )

    def weight_in(self, epoch: int) -> float:
        """The weight in an epoch, counted from 0."""
        return self.weight * min(1.0, (epoch + 1) / self.warmup_epochs) if self.warmup_epochs else self.weight

    def build(self, student: Outputs, teacher: Outputs) -> None:
        """Make the learned parts for tensors of these shapes (only the shapes may be read)."""

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """The unweighted term, a scalar.

        Args:
            student: The student's logits ``(B, C)`` and features.
            teacher: The teacher's, without gradient.
            labels: Class indices ``(B,)``, -1 where unlabelled, or class probabilities ``(B, C)``.
        """
