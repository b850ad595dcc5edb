"""Rows of a table that the processes of a run have computed."""

from typing import TypeVar

import lightning.pytorch as pl
import torch.distributed as dist

Row = TypeVar("Row")


def gather_rows(rows: list[Row], *, trainer: pl.Trainer) -> list[Row]:
    """Return the rows of all ranks, those of the first rank first.

    Args:
        rows: Rows of this rank, plain data that can be pickled.
        trainer: The Trainer.
    """
    if trainer.world_size == 1:
        return rows
    parts: list[list[Row]] = [[] for _ in range(trainer.world_size)]
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
