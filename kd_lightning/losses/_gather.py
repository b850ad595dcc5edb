"""The batch of all ranks, for losses that compare the samples of a batch with each other."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather_grad(*tensors: Tensor, active: bool = True) -> tuple[Tensor, ...]:
    """Gather the rows of all ranks in the order of ranks, with gradient.

    Backward sums the gradient over the ranks, so that after DDP's averaging a loss on the gathered batch has the
    gradient that one process would have. The ranks may hold different numbers of rows.

    Args:
        *tensors: ``(B, ...)``, with the same B.
        active: Whether to gather, or to return the tensors as they are. In one process it makes no difference.

    Returns:
        ``(B_0 + B_1 + ..., ...)`` for each; half precision becomes float32.
    """
    if not active or not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return tensors
    sizes = [torch.zeros(1, dtype=torch.int64, device=tensors[0].device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.full_like(sizes[0], len(tensors[0])))
    rows = [int(size) for size in sizes]
    return tuple(_Gather.apply(t.float() if t.dtype in (torch.float16, torch.bfloat16) else t, rows) for t in tensors)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rows: list[int]) -> Tensor:
        ctx.start, ctx.rows = sum(rows[: dist.get_rank()]), len(tensor)
        padded = tensor.new_zeros(max(rows), *tensor.shape[1:])  # collectives need equal shapes
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.rows], None
