"""The values that a setting may have."""

from collections.abc import Hashable
from math import inf, isfinite
from numbers import Integral, Real
from typing import NamedTuple


class Allowed(NamedTuple):
    """Finite numbers of a kind, in an interval; or true and false.

    Attributes:
        kind: ``bool``, ``int`` or ``float``.
        low: The smallest number.
        high: The largest number.
        below: Whether all numbers are below ``high``.

    Example:
        >>> 0.5 in Allowed(float, 0, 1), "0.5" in Allowed(float, 0, 1), 1.5 in Allowed(int)
        (True, False, False)
        >>> print(Allowed(int), "|", Allowed(float, 0, 1, below=True))
        an integer >= 0 | in [0, 1)
    """

    kind: type[bool] | type[int] | type[float]
    low: float = 0
    high: float = inf
    below: bool = False

    def __contains__(self, value: object) -> bool:
        if self.kind is bool:
            return isinstance(value, Hashable) and value in (False, True)
        if not isinstance(value, Integral if self.kind is int else Real):
            return False
        number = float(value)
        return isfinite(number) and self.low <= number <= self.high and not (self.below and number == self.high)

    def __str__(self) -> str:
        if self.kind is bool:
            return "true or false"
        limits = f">= {self.low}" if self.high == inf else f"in [{self.low}, {self.high}{')' if self.below else ']'}"
        return f"an integer {limits}" if self.kind is int else limits
