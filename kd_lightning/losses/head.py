"""A loss on one head of a network that has several, DeiT's distillation token for example."""

from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._precision import widen
from kd_lightning.losses.base import DistillationLoss


class HeadLoss(DistillationLoss):
    """Another loss, computed with the logits of one head in place of the network's output.

    A network with two heads (DeiT's class token and distillation token) returns the mean of their logits. Its heads
    are layers like others, so that each may learn from something else. DeiT's objective is::

        "hard": HeadLoss(HardTargetLoss(weight=0.5), student_head="head"),
        "token": HeadLoss(HardDistillationLoss(weight=0.5), student_head="head_dist"),

    with timm's names, and for soft distillation ``SoftTargetLoss(temperature=1.0, weight=0.5)`` (where the released
    code divides by the number of classes as well). A teacher with two heads teaches by its output unless one of them
    is named.

    H. Touvron et al.: Training data-efficient image transformers & distillation through attention, ICML 2021,
    https://arxiv.org/abs/2012.12877; authors' code: https://github.com/facebookresearch/deit

    Args:
        loss: The loss, whose weight and warm-up count.
        student_head: Dotted name of the student's layer whose output ``(B, C)`` takes the place of its logits.
        teacher_head: The same for the teacher; its output by default.

    Example:
        >>> import torch
        >>> from kd_lightning.losses import HardTargetLoss
        >>> student = Outputs(torch.rand(2, 4), {"head": torch.zeros(2, 4)})
        >>> HeadLoss(HardTargetLoss(), student_head="head")(student, student, torch.tensor([3, 1]))
        tensor(1.3863)
    """

    def __init__(self, loss: DistillationLoss, *, student_head: str, teacher_head: str | None = None) -> None:
        super().__init__(weight=loss.weight, warmup_epochs=loss.warmup_epochs)
        self.student_layers = (*loss.student_layers, student_head)
        self.teacher_layers = (*loss.teacher_layers, *([] if teacher_head is None else [teacher_head]))
        self.loss = loss
        self.student_head = student_head
        self.teacher_head = teacher_head
        self.needs_teacher = loss.needs_teacher
        self.compares_logits = loss.compares_logits
        self.multi_label = loss.multi_label
        self.views = loss.views
        self.capturable = getattr(loss, "capturable", True)

    def weight_at(self, epoch: int) -> float:
        """Return the weight of the loss, which may have a schedule of its own."""
        return self.loss.weight_at(epoch)

    def check(self, student: Outputs, teacher: Outputs) -> None:
        """Raise a ``UserError`` for layers that return no logits, or logits of other classes than they should."""
        heads = [(student, self.student_head), *([] if self.teacher_head is None else [(teacher, self.teacher_head)])]
        for outputs, head in heads:
            wanted, found = tuple(outputs.logits.shape), tuple(outputs.features[head].shape)
            if found != wanted:
                raise UserError(
                    f"HeadLoss reads logits {wanted} like those of the network, but layer {head!r} returns {found}; "
                    "name the last layer of a head."
                )
        self.loss.check(*self._at_heads(student, teacher))

    def build(
        self,
        student: Outputs,
        teacher: Outputs,
        *,
        student_network: nn.Module | None = None,
        teacher_network: nn.Module | None = None,
    ) -> None:
        """Create the learned parts of the loss."""
        outputs = self._at_heads(student, teacher)
        self.loss.build(*outputs, student_network=student_network, teacher_network=teacher_network)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`."""
        self.loss.progress, self.loss.epoch, self.loss.all_labelled = self.progress, self.epoch, self.all_labelled
        term: Tensor = self.loss(*self._at_heads(student, teacher), labels)
        self.metrics = self.loss.metrics
        return term

    def _at_heads(self, student: Outputs, teacher: Outputs) -> tuple[Outputs, Outputs]:
        student = student._replace(logits=widen(student.features[self.student_head]))
        if self.teacher_head is not None:
            teacher = teacher._replace(logits=teacher.features[self.teacher_head])
        return student, teacher
