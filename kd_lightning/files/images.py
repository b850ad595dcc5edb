"""Reading of image files with Pillow; importable without torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from kd_lightning.errors import UserError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@contextmanager
def open_image(file: Path) -> Iterator[Image.Image]:
    """Open an image file while the context lasts.

    Raises:
        UserError: If it is not a readable image, which may be found only while it is decoded.
    """
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{str(file)!r} cannot be read as an image; fix or remove it.") from error


def load_image(file: Path, mode: str, size: tuple[int, int] | None) -> Image.Image:
    """Return the decoded image of a file.

    Args:
        file: Image file of any format that Pillow reads.
        mode: Mode of the result, ``"RGB"`` or ``"L"``.
        size: Size ``(H, W)`` of the result; ``None`` for the image's own.

    Raises:
        UserError: If it is not a readable image, or has 16 or 32 bits of grey.
    """
    with open_image(file) as image:
        deep, decoded = image.mode.startswith(("I", "F")), image.convert(mode)
    if deep:  # Pillow would turn everything above 255 to white
        raise UserError(f"{str(file)!r} has more than 8 bits a pixel of grey; save it with 8 bits.")
    if size is not None and decoded.size != size[::-1]:
        decoded = decoded.resize(size[::-1], Image.Resampling.BILINEAR)
    return decoded
