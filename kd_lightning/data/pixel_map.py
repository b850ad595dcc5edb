"""Bytes of a file as a tensor that takes no memory of its own."""

import mmap
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kd_lightning.errors import MissingFileError


@dataclass(frozen=True)
class PixelMap:
    """A part of a file that is mapped into memory, where processes share it and the system keeps what it has room for.

    Attributes:
        file: Path of the file.
        start: Place of the first byte.
        length: Number of bytes.
    """

    file: Path
    start: int
    length: int

    def open(self) -> Tensor:
        """Return the bytes, uint8 ``(length,)``; they cannot be written to.

        Raises:
            MissingFileError: If the file has been removed.
        """
        try:
            with self.file.open("rb") as opened:
                mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise MissingFileError(
                f"{str(self.file)!r} has been removed while its images are read; start again, and it is written again."
            ) from error
        with warnings.catch_warnings():  # torch does not know read-only tensors
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            if not self.length:
                return torch.empty(0, dtype=torch.uint8)
            return torch.frombuffer(mapped, dtype=torch.uint8, count=self.length, offset=self.start)
