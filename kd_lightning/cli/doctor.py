"""`kd-lightning doctor`."""

import logging
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from kd_lightning.cli.machine import describe_cpu, describe_gpus, shared_memory_problem
from kd_lightning.errors import first_line

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "jsonargparse", "tensorboard", "numpy", "pillow")
_OPTIONAL = {
    "onnx": 'export to ONNX: pip install "kd-lightning[export]"',
    "onnxruntime": 'run and quantize ONNX files: pip install "kd-lightning[export]"',
    "onnxscript": 'export to ONNX: pip install "kd-lightning[export]"',
    "torch-pruning": 'prune channels: pip install "kd-lightning[prune]"',
    "timm": "networks of timm: pip install timm",
    "pillow-heif": "read .heic photographs: pip install pillow-heif",
}
"""Packages that some commands need, and what for."""
_PHOTOGRAPHS, _SIZE = 96, 224


def doctor() -> None:
    """Print versions, devices, precision, the speed of reading images and what is missing, to paste into an issue."""
    print("```text", flush=True)
    for title, describe in _lines():
        print(f"{title:<14}", end="", flush=True)  # what takes seconds shows its title meanwhile
        print(describe() if callable(describe) else describe, flush=True)
    print("```")


def _lines() -> Iterator[tuple[str, str | Callable[[], str]]]:
    from kd_lightning import __version__

    yield "kd_lightning", f"{__version__} with Python {platform.python_version()} on {platform.platform()}"
    yield "packages", ", ".join(f"{name} {found}" for name in _PACKAGES if (found := installed(name)))
    yield "CPU", partial(_tried, describe_cpu)
    yield "GPU", partial(_tried, lambda: "; ".join(describe_gpus()))
    yield "precision", partial(_tried, _describe_precision)
    yield "loading", partial(_tried, _describe_loading)
    yield "optional", ", ".join(f"{name} {found}" for name in _OPTIONAL if (found := installed(name))) or "none"
    missing = [f"{name} ({use})" for name, use in _OPTIONAL.items() if installed(name) is None]
    for problem in [*_other_versions(), *missing, shared_memory_problem()]:
        if problem is not None:
            yield "missing", problem


def _tried(describe: Callable[[], str]) -> str:
    """Return a description, or why there is none: this command is run where something is broken."""
    try:
        return describe()
    except Exception as error:
        return f"failed with {type(error).__name__}: {first_line(error)}"


def _other_versions() -> list[str]:
    """Return a sentence for each required package that is absent or has a version that does not fit."""
    with suppress(ImportError, PackageNotFoundError):
        from packaging.requirements import Requirement  # of lightning

        wanted = [Requirement(text) for text in requires("kd-lightning") or []]
        return [
            f"{need.name} {found or 'is not installed'} (needed: {need.name}{need.specifier})"
            for need in wanted
            if need.marker is None and not ((found := installed(need.name)) and need.specifier.contains(found))
        ]
    return []


def installed(package: str) -> str | None:
    """Return the version of an installed package, or ``None``.

    Example:
        >>> installed("no-such-package") is None
        True
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _describe_precision() -> str:
    """Return how fast products of matrices in half precision are, measured on the device that trains by default."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    factor = _seconds_of_products(device, torch.float32) / _seconds_of_products(device, torch.bfloat16)
    advice = "train with --trainer.precision bf16-mixed" if factor > 1.2 else "train with --trainer.precision 32-true"
    name = "the GPU" if device.type == "cuda" else "the CPU"
    return f"matrix products in bfloat16 are {factor:.1f} times as fast as in float32 on {name}; {advice}"


def _seconds_of_products(device: "torch.device", dtype: "torch.dtype", size: int = 1024) -> float:
    import torch

    matrix = torch.ones(size, size, device=device, dtype=dtype)

    def multiply() -> None:
        torch.mm(matrix, matrix)
        if matrix.is_cuda:
            torch.cuda.synchronize()

    return _seconds(multiply)


def _seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the median duration of some work, after one run to warm up."""
    work()
    durations = []
    for _ in range(repeats):
        start = perf_counter()
        work()
        durations.append(perf_counter() - start)
    return median(durations)


def _describe_loading() -> str:
    """Return how many photographs a second are read and cut without workers, from files and once they are decoded."""
    with tempfile.TemporaryDirectory() as folder, _without_messages():
        _save_photographs(Path(folder))
        files, decoded = (_images_per_second(folder, memory_limit=limit) for limit in (0.0, 1.0))
    return (
        f"{files:,.0f} JPEG photographs of 500x375 a second in one process, cut to {_SIZE}; {decoded:,.0f} once they "
        "are decoded in memory"
    )


@contextmanager
def _without_messages() -> Iterator[None]:
    """Leave out the lines in which a data module says where its images are kept."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _images_per_second(folder: str, memory_limit: float) -> float:
    from kd_lightning import ImageFolderDataModule

    data = ImageFolderDataModule(folder, image_size=_SIZE, batch_size=16, memory_limit=memory_limit, cache="off")
    data.setup("fit")
    loader = data.train_dataloader()
    images = sum(len(batch.labels) for batch in loader)
    return images / _seconds(lambda: list(loader), repeats=2)


def _save_photographs(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(_PHOTOGRAPHS):
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        place = folder / "train" / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(place / f"{number}.jpg", quality=90)
