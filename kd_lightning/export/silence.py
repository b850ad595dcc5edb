"""Silences libraries while they export."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silenced() -> Iterator[None]:
    """Suppress warnings and log messages below critical: users cannot act on those of exporters.

    Afterwards ``logging.disable`` is as it was before.

    Example:
        >>> with silenced():
        ...     logging.root.manager.disable == logging.ERROR
        True
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.ERROR))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
