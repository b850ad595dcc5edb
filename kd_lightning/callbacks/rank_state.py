"""State that differs between the ranks, in one checkpoint."""

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor


def gather_ranks(value: Tensor, trainer: pl.Trainer) -> Tensor:
    """Return the values of all ranks, ``(ranks, ...)``; every rank must call it."""
    if trainer.world_size == 1:
        return value.unsqueeze(0)
    values = [torch.empty_like(value) for _ in range(trainer.world_size)]
    dist.all_gather(values, value.contiguous())
    return torch.stack(values)


def select_rank(values: Tensor, trainer: pl.Trainer, device: torch.device) -> Tensor:
    """Return this rank's value of ``(ranks, ...)``, or their mean where a run resumes with another number of ranks."""
    same = len(values) == trainer.world_size
    return (values[trainer.global_rank] if same else values.mean(0)).to(device)
