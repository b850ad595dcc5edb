"""The devices of a Trainer: which are refused, and how they are described."""

from contextlib import suppress
from functools import cache
from pathlib import Path

import lightning.pytorch as pl
import torch

from kd_lightning.errors import UserError


def check_device(trainer: pl.Trainer) -> None:
    """Refuse a device on which this package was never tested.

    Raises:
        ValueError: If the Trainer's device is Apple's MPS.
    """
    if trainer.strategy.root_device.type == "mps":
        raise UserError("kd_lightning is not tested on Apple's MPS; train with accelerator='cpu', or on a CUDA GPU.")


def describe_devices(trainer: pl.Trainer) -> str:
    """Return how many devices train, and which; for example ``"trains on 2 GPUs (NVIDIA A100)"``."""
    device, count = trainer.strategy.root_device, trainer.world_size
    if device.type == "cuda":
        return f"trains on {count} GPU{'s' * (count > 1)} ({torch.cuda.get_device_name(device)})"
    place = "the CPU" if device.type == "cpu" else str(device)
    return f"trains on {place}" + (f" in {count} processes" if count > 1 else "")


def fastest_precision(device: torch.device) -> str:
    """Return the precision in which a device trains fastest, as the Trainer names it.

    That is ``"bf16-mixed"`` where the hardware computes bfloat16 (GPUs of compute capability 8.0 on, CPUs with AMX or
    AVX512-BF16), else ``"16-mixed"`` on a GPU and ``"32-true"`` on a CPU.
    """
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.get_device_capability(device) >= (8, 0) else "16-mixed"
    return "bf16-mixed" if device.type == "cpu" and {"amx_bf16", "avx512_bf16"} & _cpu_features() else "32-true"


@cache
def _cpu_features() -> frozenset[str]:
    with suppress(OSError):  # there is no such file but on Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split())
    return frozenset()


def describe_precision(trainer: pl.Trainer) -> str:
    """Return the precision, what would be faster, and on a CUDA device how float32 matrices are multiplied."""
    precision, device = str(trainer.precision), trainer.strategy.root_device
    if device.type not in ("cpu", "cuda"):
        return f"precision {precision}"
    fastest = fastest_precision(device)
    if precision == fastest:
        return f"precision {precision}, the fastest of this {'GPU' if device.type == 'cuda' else 'CPU'}"
    faster = [f"{fastest} is faster here"] if fastest != "32-true" and "bf16" not in precision else []
    if device.type == "cuda" and precision.startswith("32"):
        if torch.get_float32_matmul_precision() == "highest":
            faster.append("matrix products in full float32; torch.set_float32_matmul_precision('high') is faster")
        else:
            faster.append("matrix products in TF32")
    return f"precision {precision}" + (f" ({'; '.join(faster)})" if faster else "")


def faster_precision(trainer: pl.Trainer) -> list[str]:
    """Return the setting of a precision that is faster on the trainer's GPU, if there is one."""
    device, precision = trainer.strategy.root_device, str(trainer.precision)
    if device.type != "cuda" or precision.startswith(("bf16", "16")) or not torch.cuda.is_bf16_supported():
        return []
    return ["set trainer.precision to bf16-mixed"]
