"""Reading of image files with Pillow; importable without torch."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path

from PIL import ExifTags, Image, TiffImagePlugin

from kd_lightning.errors import UserError


class UnreadableImageError(UserError):
    """An image file that cannot be read; the message names it."""


def readable_suffixes() -> frozenset[str]:
    """Return the suffixes of files that the installed Pillow reads, in lower case.

    Packages that add formats (``pillow-heif``, ``pillow-jxl-plugin``) are used if they are installed.

    Example:
        >>> {".jpg", ".png", ".gif"} <= readable_suffixes()
        True
    """
    formats = {*_formats(), "MPO"}  # which the reader of JPEG opens
    return frozenset(suffix for suffix, format in Image.registered_extensions().items() if format in formats)


def load_image(file: Path, mode: str) -> Image.Image:
    """Return an image as a viewer shows it.

    It is turned as its EXIF orientation says, transparent parts are white, of an animation it is the first frame, and
    colours become grey by luma (ITU-R BT.601).

    Args:
        file: Image file of any format that Pillow reads.
        mode: Mode of the result, ``"RGB"`` or ``"L"``.

    Raises:
        UnreadableImageError: If it is not a readable image, or has 16 or 32 bits of grey.
    """
    with _opened(file) as image:
        image.load()
        return as_shown(image, mode)


def as_shown(image: Image.Image, mode: str) -> Image.Image:
    """Return a decoded image as a viewer shows it; see :func:`load_image`."""
    orientation = _orientation(image)
    decoded = (_on_white(image) if image.has_transparency_data else image).convert(mode)
    return decoded.transpose(_TURNS[orientation]) if orientation in _TURNS else decoded


def shown_size(file: Path) -> tuple[int, int]:
    """Return height and width of the image that a viewer shows, by its header.

    They are exchanged if a PNG file has its orientation behind the pixels, which is only found while it is decoded.

    Raises:
        UnreadableImageError: If it is not that of an image that :func:`load_image` reads.
    """
    with _opened(file) as image:
        width, height = image.size
        if isinstance(image, TiffImagePlugin.TiffImageFile):  # whose sides newer versions of Pillow have exchanged
            width, height = (image.tag_v2[tag] for tag in (TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH))
        known = image.format != "PNG" or "exif" in image.info  # otherwise Pillow would decode the file to look for it
        turned = known and _orientation(image) > 4
        return (width, height) if turned else (height, width)


def unreadable(file: Path) -> UnreadableImageError:
    """Return the error of a file that is damaged, or no image."""
    return UnreadableImageError(f"{str(file)!r} cannot be read as an image; fix or remove it.")


def describe_unreadable(errors: list[UnreadableImageError], count: int) -> str:
    """Return one message for all images that cannot be read: the first five by name.

    Args:
        errors: Errors of reading them; not empty.
        count: Number of images that were to be read.
    """
    if len(errors) == 1:
        return str(errors[0])
    more = f" And {len(errors) - 5} more." if len(errors) > 5 else ""
    return f"{len(errors)} of {count} images cannot be read. {' '.join(map(str, errors[:5]))}{more}"


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(file, formats=_formats()) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would turn everything above 255 to white
                raise UnreadableImageError(f"{str(file)!r} has more than 8 bits a pixel of grey; save it with 8 bits.")
            yield image
    except UserError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise almost anything, some only while it is decoded
        raise unreadable(file) from error


def _formats() -> list[str]:
    _register_plugins()
    return [format for format in Image.ID if format not in _OTHER_FORMATS]


@cache
def _register_plugins() -> None:
    Image.init()
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    with suppress(ImportError):
        import_module("pillow_jxl")  # registers itself


_OTHER_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats of which Pillow reads the header only, or runs another program to draw them."""


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; a damaged entry counts as none, as in viewers."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, TypeError, LookupError):
        return 1
    return orientation if isinstance(orientation, int) else 1


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _on_white(image: Image.Image) -> Image.Image:
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
