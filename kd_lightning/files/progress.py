"""Progress of long work: a bar on a terminal, a line every ten per cent elsewhere or above another bar."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

DELAY = 2.0
"""Seconds after which work is long enough to be shown."""
_BELOW_A_BAR = "rich_proxied_file"
"""What standard error has while rich, as for Lightning, draws a bar; it shows whole lines only."""


@contextmanager
def progress(title: str, total: int, *, unit: str = "images", visible: bool = True) -> Iterator[Callable[[int], None]]:
    """Show the progress of work that takes longer than two seconds, with the time that is left, on standard error.

    Args:
        title: The work, for example ``"Decoding images"``.
        total: Number of steps.
        unit: Name of the steps.
        visible: Show it; false in all but one of several processes that do the same.

    Yields:
        A function that is called with the number of steps that were done since its last call.
    """
    if not visible:
        yield lambda count: None
        return
    if sys.stderr.isatty() and not hasattr(sys.stderr, _BELOW_A_BAR):
        from tqdm import tqdm

        with tqdm(total=total, desc=title, unit=f" {unit}", delay=DELAY, leave=False) as bar:
            yield lambda count: bar.update(count) and None
        return
    started, done, shown = monotonic(), 0, 0

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        tenths, seconds = 10 * done // max(total, 1), monotonic() - started
        if seconds > DELAY and shown < tenths < 10:
            shown = tenths
            left = seconds * (total - done) / done
            print(
                f"{title}: {10 * tenths} % of {total} {unit}, {describe_duration(left)} left",
                file=sys.stderr,
                flush=True,
            )

    yield advance


def describe_duration(seconds: float) -> str:
    """Return a duration in whole seconds, minutes or hours.

    Example:
        >>> describe_duration(8.2), describe_duration(150), describe_duration(9000)
        ('8 s', '3 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{-(-seconds // 60):.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
