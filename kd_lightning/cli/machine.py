"""The machine that a command runs on: processor, memory, devices, and the room for workers."""

import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path

from kd_lightning.files.byte_count import describe_bytes
from kd_lightning.files.memory import available_memory

_SMALL_SHARED_MEMORY = 2**30
"""Bytes below which workers that pass on batches of photographs may end with a bus error."""


def processor_name() -> str:
    """Return the name of the processor.

    Example:
        >>> len(processor_name()) > 0
        True
    """
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_cpu(folder: Path = Path()) -> str:
    """Return the processor, its cores, and the memory and disk that are free.

    Args:
        folder: Folder whose disk is described.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = describe_bytes(shutil.disk_usage(folder).free)
    many = "s" * (cores > 1)
    memory = describe_bytes(available_memory())
    return f"{processor_name()}, {cores} core{many}, {memory} of memory and {free} of disk free"


def describe_gpus() -> list[str]:
    """Return a line for each GPU that torch can use, or one line that says why there is none."""
    import torch

    if not torch.cuda.is_available():
        return [f"none ({_why_no_gpu()})"]
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        f"{gpu.name}, {describe_bytes(gpu.total_memory)}, compute capability {gpu.major}.{gpu.minor}" for gpu in found
    ]


def _why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return "this build of torch is for the CPU"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty, which hides all"
    return f"torch is built for CUDA {torch.version.cuda}, and there is no GPU or no driver for it"


def shared_memory_problem(root: Path = Path("/dev/shm")) -> str | None:
    """Return a sentence if the memory through which workers pass on batches is small, as in many containers.

    Args:
        root: The folder in which systems show it.
    """
    with suppress(OSError):
        size = shutil.disk_usage(root).total
        if size < _SMALL_SHARED_MEMORY:
            return (
                f"{root} has {describe_bytes(size)}, so workers that read photographs may end with a bus error; start "
                "the container with --shm-size=4g, or use --data.num_workers 0."
            )
    return None
