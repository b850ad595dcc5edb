"""Parameters of which the default tests run a few, and `scripts/test.sh --all` all."""

from collections.abc import Iterable
from typing import TypeVar

import pytest

T = TypeVar("T")


def mostly_slow(values: Iterable[T], *fast: T) -> list[object]:
    """Return parameters, marked as slow but for those that are named."""
    values = list(values)
    assert set(fast) <= set(values), fast
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
