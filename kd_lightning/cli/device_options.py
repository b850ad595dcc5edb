"""Defaults for devices that differ from Lightning's."""

import logging

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator


def choose_accelerator(accelerator: object) -> object:
    """Return ``"cpu"`` for ``"auto"`` where Lightning would choose Apple's MPS, on which nothing here is tested."""
    is_mps = accelerator == "auto" and MPSAccelerator.is_available() and not CUDAAccelerator.is_available()
    return "cpu" if is_mps else accelerator


def set_matmul_precision(trainer: pl.Trainer) -> None:
    """Multiply float32 matrices in TF32 if the Trainer's device is a CUDA GPU."""
    if isinstance(trainer.accelerator, CUDAAccelerator):
        torch.set_float32_matmul_precision("high")


def drop_advertisements() -> None:
    """Drop the lines in which Lightning advertises packages of its makers."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    message = record.getMessage().lower()
    return "litlogger" not in message and "litmodels" not in message
