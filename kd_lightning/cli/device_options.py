"""What the command line does about devices: which one ``auto`` is, and errors about devices in one sentence."""

import logging
import re
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator


def choose_accelerator(accelerator: Any) -> Any:
    """Return ``"cpu"`` for ``"auto"`` where Lightning would choose Apple's MPS, on which nothing here is tested."""
    is_mps = accelerator == "auto" and MPSAccelerator.is_available() and not CUDAAccelerator.is_available()
    return "cpu" if is_mps else accelerator


def set_matmul_precision(trainer: pl.Trainer) -> None:
    """Have float32 matrices multiplied in TF32, if the Trainer's device is a CUDA GPU."""
    if isinstance(trainer.accelerator, CUDAAccelerator):
        torch.set_float32_matmul_precision("high")


def explain_device_error(message: str) -> str | None:
    r"""Return one sentence for what Lightning says about a device that does not exist; ``None`` for other messages.

    Example:
        >>> explain_device_error("You requested gpu: [7]\n But your machine only has: [0]")
        'trainer.devices names the GPUs [7], and this machine has [0]; choose among those.'
    """
    found = re.search(r"You requested gpu: (\[.*\])\s+But your machine only has: (\[.*\])", message)
    if found is not None:
        return f"trainer.devices names the GPUs {found[1]}, and this machine has {found[2]}; choose among those."
    if "No supported gpu backend found" in message or "CUDAAccelerator` can not run" in message:
        return (
            "There is no GPU that torch can use on this machine; leave out trainer.accelerator, or install a GPU "
            "driver and a build of torch for it."
        )
    return None


def drop_advertisements() -> None:
    """Drop the lines in which Lightning advertises packages of its makers."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    message = record.getMessage().lower()
    return "litlogger" not in message and "litmodels" not in message
