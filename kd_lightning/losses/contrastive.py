"""Contrastive representation distillation: the student's embedding of an image is nearest to the teacher's."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.features import Outputs
from kd_lightning.losses._checks import check_positive
from kd_lightning.losses._gather import all_gather_grad
from kd_lightning.losses._labels import class_indices
from kd_lightning.losses._normalize import normalize
from kd_lightning.losses._pairs import match_dtype, require_built, vector_pairs
from kd_lightning.losses._precision import in_full_precision
from kd_lightning.losses.base import DistillationLoss

_EMPTY = -2
"""Label of a queue entry that is not filled yet."""


@in_full_precision
def contrastive_loss(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    excluded: Tensor,
    *,
    temperature: float = 0.07,
    effective_negatives: int | None = None,
) -> Tensor:
    r"""Compute the cross-entropy of finding each anchor's positive among its negatives (InfoNCE).

    .. math:: -\frac{1}{B} \sum_b \log \frac{e^{a_b \cdot p_b / \tau}}
              {e^{a_b \cdot p_b / \tau} + w_b \sum_{k \,\text{not excluded}} e^{a_b \cdot n_k / \tau}}

    with :math:`w_b` = 1, or ``effective_negatives`` / number of negatives that are not excluded.

    Args:
        anchors: Unit vectors ``(B, n)``.
        positives: Unit vectors ``(B, n)``, pairwise.
        negatives: Unit vectors ``(K, n)`` of all anchors.
        excluded: Mask of the negatives that an anchor ignores, boolean ``(B, K)``.
        temperature: :math:`\tau` > 0.
        effective_negatives: Number of negatives to which those of an anchor are scaled, however many there are.

    Returns:
        A scalar >= 0, and 0 where there are no negatives.

    Example:
        >>> anchors, negatives = torch.eye(2), torch.eye(2).flip(0)
        >>> excluded = torch.tensor([[False, True], [True, False]])
        >>> contrastive_loss(anchors, anchors, negatives, excluded, temperature=1.0)
        tensor(0.3133)
    """
    positive = (anchors * positives).sum(1, keepdim=True) / temperature
    negative = (anchors @ negatives.T / temperature).masked_fill(excluded, -torch.inf)
    if effective_negatives is not None:
        negative = negative + (effective_negatives / (~excluded).sum(1, keepdim=True).clamp(min=1)).log()
    return (torch.cat([positive, negative], dim=1).logsumexp(1, keepdim=True) - positive).mean()


class ContrastiveLoss(DistillationLoss):
    """Contrastive representation distillation (CRD): :func:`contrastive_loss` in both normalize, over the layers.

    Y. Tian, D. Krishnan, P. Isola: Contrastive Representation Distillation, ICLR 2020, https://arxiv.org/abs/1910.10699;
    authors' code: https://github.com/HobbitLong/RepDistiller

    Both networks' features pass through a learned linear layer to unit vectors. The student's embedding is
    contrasted with the teacher's embeddings of other images, and the teacher's with the student's.

    The paper draws negatives from a bank that holds a running mean of the embedding of every training image. Here they
    are the latest ``queue_size`` embeddings of images of other classes, as they were, so that no bank of the size of
    the data set and no sample numbers are needed and augmented images are never mixed; all anchors of a batch use the
    same ones; and the objective is InfoNCE in place of noise-contrastive estimation with an estimated constant, which
    for many negatives differs from it by a constant. An anchor's negatives count as ``queue_size``, also while the
    queue fills. The queue is saved in checkpoints (17 MB). In the first step it is empty, and the term 0. Unlabelled
    images have all in the queue as negatives, also their own earlier embeddings; of class probabilities the largest
    counts.

    Args:
        weight: 0.8, as released.
        student_layers: The pooled embedding by default, as released. Maps ``(B, C, H, W)`` are averaged over their
            pixels.
        teacher_layers: Names of the teacher's layers, paired with the student's; the same names by default.
        dimensions: Size of the unit vectors; 128 as released.
        temperature: 0.07 as released.
        queue_size: 16384, as many negatives as released. Best below the number of training images: older embeddings are
            stale, and the term then rises when the learning rate falls.
        gather: Whether to fill the queue with the batches of all ranks, and not with each rank's own.
        warmup_epochs: Epochs over which the weight rises linearly to its value.

    Raises:
        ValueError: If the temperature is not above 0, or ``dimensions`` or ``queue_size`` below 1.

    Example:
        >>> student = Outputs(torch.rand(4, 10), {"avgpool": torch.rand(4, 8)})
        >>> teacher = Outputs(torch.rand(4, 10), {"avgpool": torch.rand(4, 32)})
        >>> loss = ContrastiveLoss(queue_size=8)
        >>> loss.build(student, teacher)
        >>> [bool(loss(student, teacher, torch.tensor([3, 1, 0, 2])) > 0) for _ in range(2)]
        [False, True]
    """

    multi_label = False  # images of the same class are no negatives

    queues: Tensor
    queue_labels: Tensor
    position: Tensor

    def __init__(
        self,
        *,
        weight: float = 0.8,
        student_layers: Sequence[str] = ("avgpool",),
        teacher_layers: Sequence[str] | None = None,
        dimensions: int = 128,
        temperature: float = 0.07,
        queue_size: int = 16384,
        gather: bool = True,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(
            weight=weight, student_layers=student_layers, teacher_layers=teacher_layers, warmup_epochs=warmup_epochs
        )
        check_positive(temperature=temperature)
        if dimensions < 1 or queue_size < 1:
            raise UserError(f"dimensions and queue_size must be >= 1, got {dimensions} and {queue_size}.")
        self.dimensions = dimensions
        self.temperature = temperature
        self.gather = gather
        self.student_embeddings = nn.ModuleList()
        self.teacher_embeddings = nn.ModuleList()
        # for each pair of layers the student's and the teacher's embeddings of the same images
        self.register_buffer("queues", torch.zeros(len(self.student_layers), 2, queue_size, dimensions))
        self.register_buffer("queue_labels", torch.full((queue_size,), _EMPTY))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def build(self, student: Outputs, teacher: Outputs, **networks: nn.Module | None) -> None:
        """Create two linear layers for each pair of layers."""
        pairs = vector_pairs(self, student, teacher)
        self.student_embeddings = nn.ModuleList(nn.Linear(s.shape[1], self.dimensions) for s, _ in pairs)
        self.teacher_embeddings = nn.ModuleList(nn.Linear(t.shape[1], self.dimensions) for _, t in pairs)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the term for one batch, see :class:`DistillationLoss`; the batch then enters the queue."""
        labels = class_indices(labels).long()
        same_class = (labels[:, None] == self.queue_labels) & (labels[:, None] >= 0)
        excluded = same_class | (self.queue_labels == _EMPTY)
        embeddings = zip(require_built(self, self.student_embeddings), self.teacher_embeddings, strict=True)
        pairs = zip(embeddings, vector_pairs(self, student, teacher), strict=True)
        embedded = [(_unit(a, s), _unit(b, t)) for (a, b), (s, t) in pairs]
        size = len(self.queue_labels)
        # a copy, since the backward pass reads the queues after the batch has entered them
        queues = self.queues.clone() if self.training else self.queues
        terms = [
            contrastive_loss(s, t, queue[1], excluded, temperature=self.temperature, effective_negatives=size)
            + contrastive_loss(t, s, queue[0], excluded, temperature=self.temperature, effective_negatives=size)
            for (s, t), queue in zip(embedded, queues, strict=True)
        ]
        if self.training:
            self._enqueue(torch.stack([torch.stack(pair) for pair in embedded]).detach(), labels)
        return torch.stack(terms).sum()

    @torch.no_grad()
    def _enqueue(self, embedded: Tensor, labels: Tensor) -> None:
        size = len(self.queue_labels)
        rows, labels = all_gather_grad(embedded.movedim(2, 0), labels, active=self.gather)
        rows, labels = rows[-size:], labels[-size:]
        indices = (self.position + torch.arange(len(labels), device=labels.device)) % size
        self.queues.index_copy_(2, indices, rows.movedim(0, 2).to(self.queues))
        self.queue_labels.index_copy_(0, indices, labels)
        self.position.add_(len(labels)).remainder_(size)


def _unit(embedding: nn.Module, vectors: Tensor) -> Tensor:
    return in_full_precision(normalize)(embedding(match_dtype(embedding, vectors)))
