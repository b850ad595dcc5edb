"""A grid of images with their class names."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

_COLUMNS = 8
_PIXELS = 2**20
"""Pixels of a whole grid, to which large images are reduced."""
_READABLE = 128
"""Side of a cell to which small images are enlarged."""
_GAP = 6
_LINE = 15
_FONT_SIZE = 12


def image_grid(images: Tensor, captions: Sequence[str], *, columns: int | None = None) -> Image.Image:
    """Draw images in rows of eight (of more where there are many) or of ``columns``, each with its caption below.

    Small images are enlarged by a whole number, and large ones reduced until the grid has about a million pixels.

    Args:
        images: Floats in [0, 1], ``(B, channels, H, W)`` with 1 or 3 channels.
        captions: One for each image; a line that is wider than its image is cut in front of its last number.
        columns: Images in a row.
    """
    columns = columns or min(len(images), max(_COLUMNS, math.isqrt(2 * len(images))))
    rows = math.ceil(len(images) / columns)
    below = _LINE * max(caption.count("\n") + 1 for caption in captions)
    height, width = _cell_size(images.shape[2], images.shape[3], area=_PIXELS / (rows * columns), below=below + _GAP)
    pixels = (_resized(images, height, width) * 255).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    grid = Image.new("RGB", (columns * (width + _GAP), rows * (height + below + _GAP)), "white")
    draw, font = ImageDraw.Draw(grid), _font()
    for number, (cell, caption) in enumerate(zip(pixels, captions, strict=True)):
        row, column = divmod(number, columns)
        x, y = column * (width + _GAP) + _GAP // 2, row * (height + below + _GAP) + _GAP // 2
        grid.paste(Image.fromarray(cell.numpy()), (x, y))
        for place, line in enumerate(caption.split("\n")):
            at = x + width / 2, y + height + 1 + place * _LINE
            draw.text(at, _cut(line, width, font), fill="black", font=font, anchor="ma")
    return grid


def label_captions(labels: Tensor, classes: Sequence[str], *, multi_label: bool = False) -> list[str]:
    r"""Return what is written below images: the class, or of a mixed image the two most probable ones.

    Args:
        labels: Class indices ``(B,)``, -1 where unlabelled, or class probabilities ``(B, C)``, without any where
            unlabelled.
        classes: Names of the classes; numbers are written for those that have none.
        multi_label: Whether labels are 1 for each class of an image and 0 for the others, -1 where unlabelled, or
            fractions of mixed images: then all classes are written, joined by ``;``.

    Example:
        >>> import torch
        >>> label_captions(torch.tensor([1, -1, 2]), ["cat", "dog"])
        ['dog', 'unlabelled', '2']
        >>> label_captions(torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.0, 0.0]]), ["cat", "dog"])
        ['dog 0.7\ncat 0.3', 'cat', 'unlabelled']
        >>> label_captions(torch.tensor([[1.0, 0.3], [0.0, 0.0]]), ["cat", "dog"], multi_label=True)
        ['cat;dog 0.3', '-']
    """

    def name(number: int) -> str:
        return " ".join(classes[number].split()) if number < len(classes) else str(number)

    if labels.dim() == 1:
        return ["unlabelled" if label < 0 else name(label) for label in labels.tolist()]
    captions = []
    for row in labels.detach().float().cpu() if multi_label else ():
        parts = [(name(place), share) for place, share in enumerate(row.tolist()) if share >= 0.05]
        words = ";".join(text if share > 0.95 else f"{text} {share:.1f}" for text, share in parts)
        captions.append("unlabelled" if row.min() < 0 else words or "-")
    for row in () if multi_label else labels.detach().float().cpu():
        shares, numbers = row.topk(min(2, len(row)))
        shown = [(name(int(number)), float(share)) for number, share in zip(numbers, shares, strict=True)]
        mixed = shares[-1] >= 0.05 and len(shown) == 2
        one = shown[0][0] if row.max() > 0 else "unlabelled"
        captions.append("\n".join(f"{text} {share:.1f}" for text, share in shown) if mixed else one)
    return captions


def _cell_size(height: int, width: int, *, area: float, below: int) -> tuple[int, int]:
    """Return the size at which images are drawn, so that one and what is below it have an area."""
    # (height * factor + below) * (width * factor + gap) = area
    square, linear = height * width, height * _GAP + width * below
    root = math.sqrt(linear**2 + 4 * square * max(0.0, area - below * _GAP))
    factor = (root - linear) / (2 * square)
    if factor >= 1:
        factor = min(int(factor), max(1, round(_READABLE / max(height, width))))
    return max(1, int(height * factor)), max(1, int(width * factor))


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    if height >= images.shape[2]:
        return interpolate(images, (height, width), mode="nearest")
    return interpolate(images, (height, width), mode="bilinear", antialias=True).clamp(0, 1)


def _cut(line: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Return a line that is not wider than an image, where the class of a share is shortened and not the share."""
    if font.getlength(line) <= width:
        return line
    text, _, share = line.rpartition(" ")
    text, share = (text, f" {share}") if text and share.replace(".", "").isdigit() else (line, "")
    while text and font.getlength(f"{text}…{share}") > width:
        text = text[:-1]
    return f"{text.rstrip()}…{share}" if text else ""


def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(mpl.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), _FONT_SIZE)
