"""Differences between two networks on the same test images, with intervals; NumPy only.

Arrays hold, for each seed and each test image, whether the answer was right: booleans ``(seeds, images)``. Row s of two
arrays is a pair: both networks were trained with the same split and seed.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Right = NDArray[np.bool_]


class Difference(NamedTuple):
    """A difference of accuracies and its 95% interval, in points."""

    points: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the length of the interval."""
        return (self.high - self.low) / 2


def difference(better: Right, worse: Right, *, draws: int = 10_000, seed: int = 0) -> Difference:
    """Return how many points more are right, and the interval of a bootstrap over test images, pooled over seeds.

    An image that is drawn is drawn for all seeds and both networks. So the interval is that of other test images with
    these trained networks; it holds nothing of how much another seed would change.

    Args:
        better: Answers of the network whose accuracy counts positive.
        worse: Those of the other one.
        draws: Number of sets of images that are drawn.
        seed: Seed of the draws.

    Example:
        >>> right = np.array([[True, True, False, True]])
        >>> difference(right, right)
        Difference(points=0.0, low=0.0, high=0.0)
    """
    gains = _gains(better, worse)
    means = _resampled(len(gains), draws, seed) @ gains
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(float(gains.mean()), float(low), float(high))


def share(distilled: Right, alone: Right, teacher: Right, *, draws: int = 10_000, seed: int = 0) -> Difference:
    """Return the percentage of the gap between ``alone`` and ``teacher`` that ``distilled`` recovers, likewise."""
    gained, gap = _gains(distilled, alone), _gains(teacher, alone)
    counts = _resampled(len(gap), draws, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = 100 * (counts @ gained) / (counts @ gap)
        all_of_them = float(100 * gained.mean() / gap.mean())
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Difference(all_of_them, float(low), float(high))


def _gains(better: Right, worse: Right) -> NDArray[np.float64]:
    """Return the difference on each image in points, the mean over seeds."""
    if better.shape != worse.shape:
        raise ValueError(f"answers of {better.shape} and {worse.shape} are no pairs")
    gains: NDArray[np.float64] = 100 * (better.astype(float) - worse.astype(float)).mean(0)
    return gains


def _resampled(images: int, draws: int, seed: int) -> NDArray[np.float64]:
    """Return the weight of each image in each draw, ``(draws, images)``; a draw's sum is 1."""
    counts = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=draws)
    return counts / images
