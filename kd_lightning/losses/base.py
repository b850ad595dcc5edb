"""The two interfaces of a loss: between two networks, and between two domains."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs


class Term(nn.Module, ABC):
    """A weighted part of an :class:`Objective`; the base of :class:`DistillationLoss` and :class:`AlignmentLoss`.

    Args:
        weight: Factor of the term in the weighted sum, >= 0.
        warmup_epochs: Epochs over which the weight rises linearly, see :meth:`weight_at`; 0 for a constant weight.

    Raises:
        ValueError: If the weight or the warm-up is negative.

    Example:
        >>> from kd_lightning.losses import HardTargetLoss
        >>> term = HardTargetLoss(weight=0.5, warmup_epochs=5)
        >>> [term.weight_at(epoch) for epoch in (0, 4, 30)]
        [0.1, 0.5, 0.5]
    """

    needs_teacher: bool = False
    """Whether the term reads a teacher's outputs."""

    compares_logits: bool = False
    """Whether the term compares logits, so that both networks need the same classes."""

    multi_label: bool | None = None
    """Whether the term is for images of several classes (true), of one class (false), or for both (``None``)."""

    views: int = 1
    """Number of views of each image that the term expects from the data."""

    all_labelled: bool = False
    """Whether every training image is labelled; set by the objective before the first step."""

    capturable: bool = True
    """Whether a CUDA graph, or a compiler, can hold it: buffers change in place, and the host computes nothing."""

    weighs_classes: bool = False
    """Whether the term uses ``class_weights``."""

    class_weights: Tensor | None = None
    """Factor of each class, ``(C,)``, in a term on labels; set by the objective before the first step."""

    metrics: dict[str, Tensor]
    """Scalars of the last batch, logged as ``{term}_{metric}``; they hold no graph, so that modules can be copied."""

    progress: Tensor
    """Fraction of the training that is done, in [0, 1]; a scalar on the device, set by the objective in each step."""

    epoch: Tensor
    """The current epoch, from 0; a scalar on the device, set by the objective in each step."""

    def __init__(self, *, weight: float = 1.0, warmup_epochs: int = 0) -> None:
        super().__init__()
        if not weight >= 0:
            raise UserError(f"A loss's weight must be >= 0, got {weight}.")
        if warmup_epochs < 0:
            raise UserError(f"warmup_epochs must be >= 0, got {warmup_epochs}.")
        self.weight = weight
        self.warmup_epochs = warmup_epochs
        self.metrics = {}
        self.progress = torch.zeros(())
        self.epoch = torch.zeros((), dtype=torch.int64)

    def weight_at(self, epoch: int) -> float:
        """Return the weight in epoch ``e`` (from 0): ``weight * min(1, (e + 1) / warmup_epochs)``."""
        return self.weight * min(1.0, (epoch + 1) / self.warmup_epochs) if self.warmup_epochs else self.weight

    @abstractmethod
    def forward(self, first: Outputs, second: Outputs, labels: Tensor) -> Tensor:
        """Compute the unweighted term, a scalar, from the two outputs that the kind of loss compares."""


class DistillationLoss(Term):
    """A function of a student's and a teacher's outputs, with the layers of both that it reads.

    A subclass calls a pure function in ``forward``. Parts that are learned with the student (a regressor, variances)
    are created in ``build``, which is called once before training with the outputs of a dry run.

    Args:
        weight: Factor of the term in the weighted sum, >= 0.
        student_layers: Dotted names of the student's layers that are read.
        teacher_layers: Dotted names of the teacher's layers, paired with the student's; ``None`` for the same names.
        warmup_epochs: Epochs over which the weight rises linearly, see :meth:`Term.weight_at`.

    Raises:
        ValueError: If the weight or the warm-up is negative, or the two lists of layers differ in length.

    Example:
        >>> class LogitLoss(DistillationLoss):
        ...     def forward(self, student, teacher, labels):
        ...         return (student.logits - teacher.logits).square().mean()
        >>> LogitLoss(weight=0.5)(Outputs(torch.zeros(2, 3)), Outputs(torch.ones(2, 3)), torch.tensor([0, 1]))
        tensor(1.)
    """

    needs_teacher = True

    def __init__(
        self,
        *,
        weight: float = 1.0,
        student_layers: Sequence[str] = (),
        teacher_layers: Sequence[str] | None = None,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(weight=weight, warmup_epochs=warmup_epochs)
        self.student_layers = _names(student_layers)
        self.teacher_layers = self.student_layers if teacher_layers is None else _names(teacher_layers)
        if len(self.student_layers) != len(self.teacher_layers):
            raise UserError(
                f"Layers are compared in pairs, got {len(self.student_layers)} of the student "
                f"and {len(self.teacher_layers)} of the teacher; name as many of one as of the other."
            )

    def check(self, student: Outputs, teacher: Outputs) -> None:
        """Raise a ``UserError`` if layers with these outputs do not fit; by default all do.

        Args:
            student: Outputs of a dry run, of which only the shapes may be read.
            teacher: The teacher's outputs.
        """

    def build(
        self,
        student: Outputs,
        teacher: Outputs,
        *,
        student_network: nn.Module | None = None,
        teacher_network: nn.Module | None = None,
    ) -> None:
        """Create the learned parts for outputs of these shapes; by default there are none.

        Args:
            student: Outputs of a dry run, of which only the shapes may be read.
            teacher: The teacher's outputs.
            student_network: The network that is trained.
            teacher_network: The frozen teacher; ``None`` where a checkpoint is loaded without one.
        """

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the unweighted term, a scalar.

        Args:
            student: The student's logits ``(B, C)`` and features.
            teacher: The teacher's, without gradient; ``None`` where no term of the objective needs a teacher.
            labels: Class indices ``(B,)``, -1 where unlabelled, or class probabilities ``(B, C)``; of multi-label data
                1 for each class of an image and 0 for the others, ``(B, C)``, with rows of -1 where unlabelled.
        """


class AlignmentLoss(Term):
    """A function of one network's outputs for a source and a target domain, with the layers that it reads.

    The gradient flows through the outputs of both domains. Parts that are learned with the network (a discriminator)
    are created in ``build``, which is called once before training with the outputs of a dry run.

    Args:
        weight: Factor of the term in the weighted sum, >= 0.
        layers: Dotted names of the network's layers that are read.
        warmup_epochs: Epochs over which the weight rises linearly, see :meth:`Term.weight_at`.

    Raises:
        ValueError: If the weight or the warm-up is negative.

    Example:
        >>> class MeanLoss(AlignmentLoss):
        ...     def forward(self, source, target, labels):
        ...         return (source.logits.mean(0) - target.logits.mean(0)).square().sum()
        >>> MeanLoss()(Outputs(torch.zeros(2, 3)), Outputs(torch.ones(4, 3)), torch.tensor([0, 1]))
        tensor(3.)
    """

    def __init__(self, *, weight: float = 1.0, layers: Sequence[str] = (), warmup_epochs: int = 0) -> None:
        super().__init__(weight=weight, warmup_epochs=warmup_epochs)
        self.layers = _names(layers)

    def check(self, source: Outputs, target: Outputs) -> None:
        """Raise a ``UserError`` if layers with these outputs do not fit; by default all do.

        Args:
            source: Outputs of a dry run, of which only the shapes may be read.
            target: The same for the target.
        """

    def build(self, source: Outputs, target: Outputs, *, network: nn.Module | None = None) -> None:
        """Create the learned parts for outputs of these shapes; by default there are none.

        Args:
            source: Outputs of a dry run, of which only the shapes may be read.
            target: The same for the target.
            network: The network that is trained.
        """

    @abstractmethod
    def forward(self, source: Outputs, target: Outputs, labels: Tensor) -> Tensor:
        """Compute the unweighted term, a scalar.

        Args:
            source: Logits ``(B, C)`` and features of the source's images.
            target: Logits ``(B', C)`` and features of the target's images.
            labels: The source's class indices ``(B,)``, -1 where unlabelled, or class probabilities ``(B, C)``.
        """


def _names(layers: Sequence[str]) -> tuple[str, ...]:
    if isinstance(layers, str):
        raise UserError(f"Layers must be a list of names and not one string, got {layers!r}; write [{layers!r}].")
    return tuple(layers)
