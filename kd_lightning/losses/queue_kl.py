"""The queue's KL: label-free distillation, with the teacher's embeddings of recent images in place of classes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._gather import all_gather_grad
from kd_lightning.losses._labels import divergence
from kd_lightning.losses._normalize import normalize
from kd_lightning.losses._pairs import map_pairs, match_dtype, vector_pairs
from kd_lightning.losses._precision import in_full_precision, widen
from kd_lightning.losses.base import DistillationLoss


@in_full_precision
def queue_kl_loss(embed_student: Tensor, embed_teacher: Tensor, queue: Tensor, *, temperature: float = 0.07) -> Tensor:
    r"""Compute the divergence of the student from the teacher, with the rows of a queue in place of classes.

    .. math:: \frac{1}{B} \sum_b \mathrm{KL}(\mathrm{softmax}(t_b Q' / T) \,\|\, \mathrm{softmax}(s_b Q' / T))

    Nothing is normalized inside. Rows of the queue that are not filled yet, of zeros, take part as released.

    Args:
        embed_student: Unit vectors ``(B, n)``.
        embed_teacher: Unit vectors ``(B, n)``.
        queue: Unit vectors Q, ``(K, n)``.
        temperature: T > 0.

    Returns:
        A scalar >= 0, and 0 where both agree.

    Example:
        >>> queue_kl_loss(torch.eye(2), torch.eye(2).flip(0), torch.eye(2), temperature=1.0)
        tensor(0.4621)
    """
    return divergence(*((z @ queue.T / temperature).log_softmax(1) for z in (embed_student, embed_teacher))).mean()


@in_full_precision
def queue_kl_v3_local_loss(local_student: Tensor, local_teacher: Tensor, *, temperature_local: float = 0.07) -> Tensor:
    """Compute :func:`queue_kl_loss` of each token, with all tokens of its image in place of a queue, itself included.

    Args:
        local_student: Unit vectors ``(B, N, n)``, n that of the teacher or not.
        local_teacher: Unit vectors ``(B, N, m)``.
        temperature_local: T > 0.

    Returns:
        A scalar >= 0, a mean over B N tokens, and 0 where both agree.

    Example:
        >>> queue_kl_v3_local_loss(torch.eye(2)[None], torch.ones(1, 2, 1), temperature_local=1.0)
        tensor(0.1201)
    """
    products = (z @ z.transpose(1, 2) / temperature_local for z in (local_student, local_teacher))
    return divergence(*(z.flatten(0, 1).log_softmax(1) for z in products)).mean()


@in_full_precision
def queue_kl_v3_loss(
    embed_student: Tensor,
    embed_teacher: Tensor,
    local_student: Tensor,
    local_teacher: Tensor,
    queue: Tensor,
    *,
    temperature_global: float = 0.07,
    temperature_local: float = 0.07,
    local_weight: float = 1.0,
) -> Tensor:
    """Compute :func:`queue_kl_loss`, and :func:`queue_kl_v3_local_loss` with a weight.

    Args:
        embed_student: Unit vectors ``(B, n)``.
        embed_teacher: Unit vectors ``(B, n)``.
        local_student: Unit vectors ``(B, N, n)``.
        local_teacher: Unit vectors ``(B, N, m)``.
        queue: Unit vectors ``(K, n)``.
        temperature_global: Temperature of the first term, > 0.
        temperature_local: Temperature of the second term, > 0.
        local_weight: Weight of the second term.

    Returns:
        A scalar >= 0, and 0 where both agree.

    Example:
        >>> images, tokens = torch.eye(2), torch.eye(2)[None].expand(2, 2, 2)
        >>> queue_kl_v3_loss(images, images, tokens, tokens, images)
        tensor(0.)
    """
    whole = queue_kl_loss(embed_student, embed_teacher, queue, temperature=temperature_global)
    return whole + local_weight * queue_kl_v3_local_loss(
        local_student, local_teacher, temperature_local=temperature_local
    )


@in_full_precision
def queue_kl_step_loss(
    features_student: Tensor,
    features_teacher: Tensor,
    queue: Tensor,
    *,
    head: nn.Module,
    temperature: float = 0.07,
) -> Tensor:
    """Compute :func:`queue_kl_loss` of features, with the teacher's batch at the front of the queue already.

    The student's features pass through a head; both sides' rows are then divided by their lengths. The queue that is
    read is that of :func:`push_to_queue`, which the caller keeps.

    Args:
        features_student: ``(B, n)``.
        features_teacher: ``(B, m)``.
        queue: Unit vectors ``(K, m)``, before the step.
        head: A module of n values to m.
        temperature: T > 0.

    Returns:
        A scalar >= 0.

    Example:
        >>> queue_kl_step_loss(torch.eye(2), 3 * torch.eye(2), torch.zeros(4, 2), head=nn.Identity())
        tensor(0.)
    """
    student, teacher = normalize(_through(head, features_student)), normalize(features_teacher)
    return queue_kl_loss(student, teacher, push_to_queue(queue, teacher), temperature=temperature)


def push_to_queue(queue: Tensor, rows: Tensor) -> Tensor:
    """Return a queue of the same length that begins with new rows; of more rows than it holds, with the first ones.

    Args:
        queue: ``(K, n)``.
        rows: ``(B, n)``.

    Example:
        >>> push_to_queue(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[8.0], [9.0]])).squeeze(1)
        tensor([8., 9., 1.])
    """
    return torch.cat([rows.detach().to(queue), queue])[: len(queue)]


def _through(head: nn.Module, features: Tensor) -> Tensor:
    has_weights = next(head.parameters(), None) is not None
    return widen(head(match_dtype(head, features) if has_weights else features))


class QueueKLLoss(DistillationLoss):
    """Label-free distillation: :func:`queue_kl_loss`, and :func:`queue_kl_v3_local_loss` where a map is named too.

    Of LightlyTrain, without a paper: https://github.com/lightly-ai/lightly-train, its methods ``distillationv1`` and
    ``distillationv3``. They follow L. Beyer et al.: Knowledge distillation: A good teacher is patient and consistent,
    CVPR 2022, https://arxiv.org/abs/2106.05237.

    No labels are read, and teacher and student may have other classes, or none. The student's embedding passes through
    a learned linear head to the teacher's width. The teacher's batch enters the queue before the term is computed. The
    queue is saved in checkpoints (8192 rows of 768 numbers are 25 MB). LightlyTrain keeps one for each process, and
    mixes images with one factor for each batch; here the batches of all ranks fill it unless ``gather`` is off, and
    mixing is up to the data module.

    Args:
        weight: Factor of the term in the weighted sum; 1 as released.
        student_layers: The pooled embedding; a second name is a map, of which the local term is computed.
        teacher_layers: Names of the teacher's layers, paired with the student's; the same names by default.
        temperature: T > 0; 0.07 as released.
        queue_size: K; 8192 as released for more than 20,000 images (4096 above 10,000, 2048 above 4000, 1024 above 2000
            and so on: a quarter to a half of the images).
        temperature_local: Temperature of the local term, > 0; 0.07 as released.
        local_weight: Weight of the local term, >= 0; 1 as released.
        gather: Whether to fill the queue with the batches of all ranks, and not with each rank's own.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If a temperature is not above 0, ``queue_size`` below 1, ``local_weight`` negative, or not one or
            two layers are named.

    Example:
        >>> student = Outputs(torch.rand(4, 10), {"avgpool": torch.rand(4, 8)})
        >>> teacher = Outputs(torch.rand(4, 10), {"avgpool": torch.rand(4, 32)})
        >>> loss = QueueKLLoss(queue_size=16)
        >>> loss.build(student, teacher)
        >>> loss(student, teacher, torch.tensor([-1, -1, -1, -1])).shape, int(loss.queue.any(1).sum())
        (torch.Size([]), 4)
    """

    queue: Tensor | None

    def __init__(
        self,
        *,
        weight: float = 1.0,
        student_layers: Sequence[str] = ("avgpool",),
        teacher_layers: Sequence[str] | None = None,
        temperature: float = 0.07,
        queue_size: int = 8192,
        temperature_local: float = 0.07,
        local_weight: float = 1.0,
        gather: bool = True,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(
            weight=weight, student_layers=student_layers, teacher_layers=teacher_layers, warmup_epochs=warmup_epochs
        )
        if len(self.student_layers) not in (1, 2):
            raise UserError(
                "QueueKLLoss reads the pooled embedding and perhaps a map, one or two layers, got "
                f"{list(self.student_layers)}."
            )
        if not (temperature > 0 and temperature_local > 0):
            raise UserError(
                f"temperature and temperature_local must be above 0, got {temperature} and {temperature_local}."
            )
        if queue_size < 1:
            raise UserError(f"queue_size must be >= 1, got {queue_size}.")
        if not local_weight >= 0:
            raise UserError(f"local_weight must be >= 0, got {local_weight}.")
        self.temperature = temperature
        self.queue_size = queue_size
        self.temperature_local = temperature_local
        self.local_weight = local_weight
        self.gather = gather
        self.heads = nn.ModuleList()
        self.register_buffer("queue", None)

    def build(self, student: Outputs, teacher: Outputs, **networks: nn.Module | None) -> None:
        """Create a linear head for each layer, and the queue."""
        pairs = vector_pairs(self, student, teacher)
        if len(pairs) == 2:
            map_pairs(self, student, teacher)
        self.heads = nn.ModuleList(_head(s.shape[1], t.shape[1]) for s, t in pairs)
        self.queue = torch.zeros(self.queue_size, pairs[0][1].shape[1])

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`; the teacher's batch enters the queue."""
        if self.queue is None:
            raise RuntimeError("QueueKLLoss has no queue yet; call build with the outputs of a dry run first.")
        own, taught = vector_pairs(self, student, teacher)[0]
        embedded = _unit(_through(self.heads[0], own))
        target = _unit(taught).to(embedded)
        if self.training:
            (rows,) = all_gather_grad(target, active=self.gather)
            self.queue.copy_(push_to_queue(self.queue, rows))
        whole = queue_kl_loss(embedded, target, self.queue.to(embedded), temperature=self.temperature)
        if len(self.heads) == 1:
            return whole
        local = queue_kl_v3_local_loss(*self._tokens(student, teacher), temperature_local=self.temperature_local)
        return whole + self.local_weight * local

    def _tokens(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        """Return both maps as unit tokens ``(B, N, n)`` on the teacher's grid."""
        own, taught = map_pairs(self, student, teacher)[1]
        mapped = _through(self.heads[1], own.movedim(1, -1)).movedim(-1, 1)
        resized = F.interpolate(mapped, size=taught.shape[2:], mode="bilinear", align_corners=False)
        student_tokens, teacher_tokens = (_unit(z.flatten(2).transpose(1, 2), dim=2) for z in (resized, taught))
        return student_tokens, teacher_tokens.to(student_tokens)


_unit = in_full_precision(normalize)


def _head(width: int, teacher_width: int) -> nn.Linear:
    head = nn.Linear(width, teacher_width)
    nn.init.trunc_normal_(head.weight, std=0.02)  # as released
    return head
