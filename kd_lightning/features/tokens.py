"""Tokens of transformers and mixers as maps, and maps as tokens."""

from collections.abc import Iterable, Iterator, Mapping
from math import isqrt
from typing import NamedTuple

from torch import Tensor

PREFIXES = (0, 1, 2, 4, 5)
"""Usual numbers of prefix tokens: none, class, class and distillation, four registers without and with a class."""


class Grid(NamedTuple):
    """The places of tokens ``(B, N, C)`` in an image.

    Attributes:
        prefix: Number of tokens at the front that have no place: class, distillation and register tokens.
        height: Rows of the tokens after them.
        width: Columns; ``N = prefix + height * width``.

    Example:
        >>> find_grid(197, image_size=(224, 224))
        Grid(prefix=1, height=14, width=14)
    """

    prefix: int
    height: int
    width: int


class Features(dict[str, Tensor]):
    """Outputs of layers by name, with the grids of those that are tokens.

    Args:
        features: Output of each layer.
        grids: Grid of each layer that returns tokens ``(B, N, C)``, as far as it is known.

    Example:
        >>> import torch
        >>> features = Features({"norm": torch.rand(2, 17, 8)}, {"norm": Grid(1, 2, 8)})
        >>> grid_of(features, "norm")
        Grid(prefix=1, height=2, width=8)
    """

    def __init__(self, features: Mapping[str, Tensor], grids: Mapping[str, Grid]) -> None:
        super().__init__(features)
        self.grids = dict(grids)


def grid_of(features: Mapping[str, Tensor], layer: str) -> Grid | None:
    """Return the grid of a layer's tokens ``(B, N, C)``: the known one, or by arithmetic a square one.

    Example:
        >>> import torch
        >>> grid_of({"blocks.0": torch.rand(2, 17, 8)}, "blocks.0")
        Grid(prefix=1, height=4, width=4)
    """
    known = features.grids.get(layer) if isinstance(features, Features) else None
    return known or find_grid(features[layer].shape[1])


def find_grid(tokens: int, *, image_size: tuple[int, int] | None = None, prefix: int | None = None) -> Grid | None:
    """Return the grid of N tokens by arithmetic, or ``None`` where there is none.

    A declared ``prefix`` is tried first, then the usual numbers of prefix tokens, the smallest first. The rest must be
    the squares into which an image of this size can be cut; without a size, a square grid.

    Args:
        tokens: N.
        image_size: Height and width of the image.
        prefix: Declared number of prefix tokens, as timm's ``num_prefix_tokens``.

    Example:
        >>> find_grid(1 + 14 * 14), find_grid(1 + 4 * 6, image_size=(64, 96)), find_grid(12)
        (Grid(prefix=1, height=14, width=14), Grid(prefix=1, height=4, width=6), None)
    """
    for counts in ([] if prefix is None else [prefix], PREFIXES):
        for height, width, count in _candidates(tokens, counts, image_size):
            # a single token after others is hardly an image, unless that is declared
            if height * width > 1 or tokens == 1 or count == prefix:
                return Grid(count, height, width)
    return None


def _candidates(
    tokens: int, prefixes: Iterable[int], image_size: tuple[int, int] | None
) -> Iterator[tuple[int, int, int]]:
    counts = [count for count in prefixes if count < tokens]
    if image_size is not None:
        for divide in (_exactly, _down, _up):
            for count in counts:
                for patch in range(1, min(image_size) + 1):
                    height, width = (divide(side, patch) for side in image_size)
                    if height and width and height * width == tokens - count:
                        yield height, width, count
    if image_size is None or image_size[0] == image_size[1]:
        for count in counts:
            side = isqrt(tokens - count)
            if side**2 == tokens - count:
                yield side, side, count


def _exactly(side: int, patch: int) -> int | None:
    return None if side % patch else side // patch


def _down(side: int, patch: int) -> int | None:
    return side // patch


def _up(side: int, patch: int) -> int | None:
    return -(-side // patch)


def tokens_to_maps(tokens: Tensor, grid: Grid) -> Tensor:
    """Return tokens ``(B, N, C)`` as maps ``(B, C, height, width)``, without the prefix tokens.

    Example:
        >>> import torch
        >>> tokens_to_maps(torch.rand(2, 17, 8), Grid(prefix=1, height=4, width=4)).shape
        torch.Size([2, 8, 4, 4])
    """
    maps: Tensor = tokens[:, grid.prefix :].transpose(1, 2).unflatten(2, (grid.height, grid.width))
    return maps


def maps_to_tokens(maps: Tensor) -> Tensor:
    """Return maps ``(B, C, H, W)`` as tokens ``(B, H * W, C)``, row by row.

    Example:
        >>> import torch
        >>> maps_to_tokens(torch.rand(2, 8, 4, 6)).shape
        torch.Size([2, 24, 8])
    """
    return maps.flatten(2).transpose(1, 2)
