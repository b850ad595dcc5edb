"""A stored set of images: in memory as uint8, or files that are read batch by batch."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd_lightning.data.batch import RawBatch
from kd_lightning.files.images import load_image


class ImageSet(NamedTuple):
    """Images with their labels, numbered from 0.

    Attributes:
        labels: int64 ``(N,)``, -1 where unlabelled.
        pixels: uint8 ``(N, channels, H, W)``, or ``None`` where the images are read from ``files``.
        files: Their paths, where they come from files.
        size: ``(H, W)`` to which files are resized, if need be.
    """

    labels: Tensor
    pixels: Tensor | None = None
    files: Sequence[Path] = ()
    size: tuple[int, int] | None = None

    def name(self, sample: int) -> str:
        """The file of a sample, or its number."""
        return str(self.files[sample]) if self.files else str(sample)

    def read(self, samples: Tensor) -> Tensor:
        """uint8 ``(B, 3, H, W)`` of images that are not in memory."""
        return torch.stack([read_image(self.files[i], self.size) for i in samples.tolist()])

    def in_memory(self) -> "ImageSet":
        """The same set with every file decoded, once, by as many threads as there are cores."""
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(lambda file: read_image(file, self.size), self.files))
        return self._replace(pixels=torch.stack(images))


def read_image(file: Path, size: tuple[int, int] | None) -> Tensor:
    """Decode a file to uint8 RGB ``(3, H, W)``.

    Raises:
        ValueError: If it is no readable image or one of 16 or 32 bits of grey; the message names it.
    """
    rgb = load_image(file, "RGB", size)
    return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3).permute(2, 0, 1)


class Part(Dataset):
    """The samples of a stored set that a loader shows; a whole batch is fetched at once.

    Args:
        images: The stored set.
        samples: int64 ``(n,)``, which of its samples.
        store: The set's name, see :class:`RawBatch`.
        epoch: Of positions that come alone, from the sampler that Lightning's ``overfit_batches`` puts in.
    """

    def __init__(self, images: ImageSet, samples: Tensor, store: str, epoch: int = -1) -> None:
        self.images = images
        self.samples = samples
        self.store = store
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: tuple[int, int] | int) -> RawBatch:
        return self.__getitems__([place])

    def __getitems__(self, places: Sequence[tuple[int, int] | int]) -> RawBatch:
        known = [place if isinstance(place, tuple) else (place, self.epoch) for place in places]
        ids = self.samples[[position for position, _ in known]]
        resident = self.images.pixels is not None
        pixels = torch.empty((len(ids), 0), dtype=torch.uint8) if resident else self.images.read(ids)
        return RawBatch(pixels, self.images.labels[ids], ids, known[0][1], self.store)
