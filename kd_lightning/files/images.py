"""Image files as Pillow reads them; needs no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from kd_lightning.errors import UserError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@contextmanager
def opened(file: Path) -> Iterator[Image.Image]:
    """An image file, as long as it is open.

    Raises:
        ValueError: If it is no readable image, found on opening or while it is decoded; the message names it.
    """
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{str(file)!r} cannot be read as an image; mend it or take it away.") from error


def decoded(file: Path, mode: str, size: tuple[int, int] | None) -> Image.Image:
    """The image in a file.

    Args:
        file: Of any format that Pillow reads.
        mode: ``"RGB"`` or ``"L"``.
        size: ``(H, W)`` to which it is resized, if need be.

    Raises:
        ValueError: If it is no readable image or one of 16 or 32 bits of grey; the message names it.
    """
    with opened(file) as image:
        deep, seen = image.mode.startswith(("I", "F")), image.convert(mode)
    if deep:  # Pillow would turn everything above 255 to white
        raise UserError(f"{str(file)!r} has more than 8 bits a pixel of grey; save it with 8 bits.")
    if size is not None and seen.size != size[::-1]:
        seen = seen.resize(size[::-1], Image.Resampling.BILINEAR)
    return seen
