"""Prepares a decoded image for a network, as torchvision and timm do in evaluation; importable without torch."""

from typing import NamedTuple

from PIL import Image

from kd_lightning.errors import UserError

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
"""Pillow's filters by the names that torchvision and timm use."""
MODES = ("center", "squash", "border")


class Preparation(NamedTuple):
    """Resizing and crop of an image to the size of a network.

    Attributes:
        size: Height and width that the network takes.
        resize: Height and width to which an image is resized before the crop. ``"center"`` keeps the shape of the image
            and gives the side that is relatively shorter its length, ``"border"`` the longer one, with borders beside
            it; ``"squash"`` gives both theirs.
        mode: ``"center"``, ``"squash"`` or ``"border"``, as timm's ``crop_mode``.
        interpolation: Filter that resizes, a key of :data:`RESAMPLING`.
        fill: Grey levels of the borders, one for each channel.
    """

    size: tuple[int, int]
    resize: tuple[int, int]
    mode: str = "center"
    interpolation: str = "bilinear"
    fill: tuple[int, ...] = (0,)

    @classmethod
    def of(
        cls,
        size: int | tuple[int, int],
        resize: int | tuple[int, int] | None = None,
        *,
        mode: str = "center",
        interpolation: str = "bilinear",
        fill: tuple[int, ...] = (0,),
    ) -> "Preparation":
        """Return a checked preparation; without ``resize`` nothing is cut off the shorter side.

        Raises:
            UserError: If a size is not one or below 1, or the mode or the interpolation is not known.
        """
        size, resize = _pair(size), _pair(size if resize is None else resize)
        if mode not in MODES:
            raise UserError(f"The crop mode must be {', '.join(MODES)}, got {mode!r}.")
        if interpolation not in RESAMPLING:
            raise UserError(f"The interpolation must be {', '.join(RESAMPLING)}, got {interpolation!r}.")
        if min(size) < 1 or min(resize) < 1:
            raise UserError(f"Images cannot be resized to {resize} and cropped to {size}; give sizes of at least 1.")
        return cls(size, resize, mode, interpolation, tuple(fill))

    def at(self, size: int | tuple[int, int]) -> "Preparation":
        """Return the same preparation for another size: the crop is the same part of the image.

        Example:
            >>> Preparation.of(224, 256).at(112).resize
            (128, 128)
        """
        size = _pair(size)
        if size == self.size:
            return self
        scaled = (round(new * whole / old) for new, whole, old in zip(size, self.resize, self.size, strict=True))
        height, width = scaled
        return self._replace(size=size, resize=(height, width))


def prepare(image: Image.Image, preparation: Preparation) -> Image.Image:
    """Resize and crop an image, to the bit as the transforms of torchvision and timm do.

    Args:
        image: Image of mode ``"RGB"`` or ``"L"``.
        preparation: The sizes, and how they are reached.

    Returns:
        An image of ``preparation.size``.

    Example:
        >>> prepare(Image.new("L", (60, 40)), Preparation.of(24, 32)).size
        (24, 24)
    """
    height, width = _resized(image.height, image.width, preparation)
    if (image.height, image.width) != (height, width):
        image = image.resize((width, height), RESAMPLING[preparation.interpolation])
    fill = preparation.fill if preparation.mode == "border" else (0,)
    return _centre(image, preparation.size, fill)


def _resized(height: int, width: int, preparation: Preparation) -> tuple[int, int]:
    """Return height and width to which an image is resized before the crop."""
    high, wide = preparation.resize
    if preparation.mode == "squash":
        return high, wide
    if preparation.mode == "center" and high == wide:  # torchvision's Resize, which rounds down
        shorter, longer = sorted((height, width))
        other = int(high * longer / shorter)
        return (high, other) if height <= width else (other, high)
    down, across = height / high, width / wide
    ratio = max(down, across) if preparation.mode == "border" else min(down, across)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def _centre(image: Image.Image, size: tuple[int, int], fill: tuple[int, ...]) -> Image.Image:
    """Cut out the centre, after borders are added where the image is smaller."""
    high, wide = size
    if image.height < high or image.width < wide:
        padded = max(image.height, high), max(image.width, wide)
        corner = (padded[1] - image.width) // 2, (padded[0] - image.height) // 2
        colour = fill if len(fill) == len(image.getbands()) else fill[:1] * len(image.getbands())
        larger = Image.new(image.mode, padded[::-1], colour[0] if len(colour) == 1 else colour)
        larger.paste(image, corner)
        image = larger
    if image.size == (wide, high):
        return image
    top, left = round((image.height - high) / 2.0), round((image.width - wide) / 2.0)
    return image.crop((left, top, left + wide, top + high))


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    try:
        height, width = size
        return int(height), int(width)
    except (TypeError, ValueError) as error:
        raise UserError(f"A size must be a number of pixels, or height and width, got {size!r}.") from error
