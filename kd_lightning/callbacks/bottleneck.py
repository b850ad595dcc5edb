"""The sentence about what a training spends its time on."""

from collections.abc import Sequence
from typing import NamedTuple

_NOTABLE = 0.25
"""Share of the time from which waiting for images, or augmenting them on the CPU, is named first."""


class Speed(NamedTuple):
    """The speed of steps, over all ranks.

    Attributes:
        images_per_second: Images of all ranks in a second.
        seconds: Duration.
        waiting: Share of it in which a device had nothing to do because there was no batch, in [0, 1].
        preparing: Share in which batches were augmented on the CPU after they were read.
    """

    images_per_second: float
    seconds: float
    waiting: float
    preparing: float


class Advice(NamedTuple):
    """Imperatives with the settings that shorten each part of the time, none where nothing is left to set."""

    waiting: Sequence[str] = ()
    preparing: Sequence[str] = ()
    steps: Sequence[str] = ()


def describe_bottleneck(speed: Speed, advice: Advice, *, epoch: int) -> str:
    """Return a sentence that names the largest part of the time that settings can shorten.

    Args:
        speed: The measured speed.
        advice: Settings that shorten each part.
        epoch: Number of the epoch that was measured.

    Example:
        >>> advice = Advice(waiting=["raise data.num_workers (0 now, 8 cores)"])
        >>> print(describe_bottleneck(Speed(812.4, 60.0, 0.61, 0.02), advice, epoch=0))
        812 images/s in epoch 0, with 61% of the time spent waiting for images; to train faster, raise data.num_workers (0 now, 8 cores).
    """  # noqa: E501
    waiting = f"{speed.waiting:.0%} of the time spent waiting for images"
    if max(speed.waiting, speed.preparing) < _NOTABLE:
        parts, settings = f"{waiting} and the rest on training steps", advice.steps
    elif speed.waiting >= speed.preparing:
        parts, settings = waiting, advice.waiting
    else:
        parts, settings = f"{waiting} and {speed.preparing:.0%} augmenting them on the CPU", advice.preparing
    faster = f"; to train faster, {', or '.join(settings)}" if settings else ""
    return f"{speed.images_per_second:,.0f} images/s in epoch {epoch}, with {parts}{faster}."
