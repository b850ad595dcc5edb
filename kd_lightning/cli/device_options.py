"""Defaults for devices that differ from Lightning's."""

import logging
from multiprocessing import get_context

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

from kd_lightning.callbacks.devices import fastest_precision


def choose_accelerator(accelerator: object) -> object:
    """Return ``"cpu"`` for ``"auto"`` where Lightning would choose Apple's MPS, on which nothing here is tested."""
    is_mps = accelerator == "auto" and MPSAccelerator.is_available() and not CUDAAccelerator.is_available()
    return "cpu" if is_mps else accelerator


def choose_precision(accelerator: object, devices: object, strategy: object) -> str | None:
    """Return the fastest precision of the devices that the Trainer's options name; ``None`` where they do not exist.

    Args:
        accelerator: The Trainer's option, as the two below.
        devices: Devices of it.
        strategy: Strategy; processes that are forked must not find CUDA in use.
    """
    if accelerator not in ("auto", "gpu", "cuda") or not CUDAAccelerator.is_available():
        return fastest_precision(torch.device("cpu")) if accelerator in ("auto", "cpu") else None
    chosen = range(torch.cuda.device_count())
    if isinstance(devices, list) or (str(devices).lstrip("-").isdecimal() and str(devices) != "-1"):
        numbers = devices if isinstance(devices, list) else range(int(str(devices)))
        chosen = [number for number in numbers if number in chosen]  # type: ignore[assignment]
    if any(word in str(strategy) for word in ("fork", "notebook")):
        with get_context("spawn").Pool(1) as pool:
            found = pool.map(_fastest_of_gpu, chosen)
    else:
        found = [_fastest_of_gpu(number) for number in chosen]
    return next((precision for precision in found if precision != "bf16-mixed"), found[0] if found else None)


def _fastest_of_gpu(number: int) -> str:
    return fastest_precision(torch.device("cuda", number))


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
