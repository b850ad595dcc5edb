"""Ends a command with an error: one sentence for what a user can correct, a traceback for a bug."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from kd_lightning.errors import UserError, find_cause, user_message


@contextmanager
def exit_on_error(command: str, *others: type[Exception]) -> Iterator[None]:
    """Exit with one sentence for errors that a user can correct; let all others show their traceback.

    With ``KD_LIGHTNING_TRACEBACK`` in the environment every error shows its traceback.

    Args:
        command: Name of the command, printed before the sentence.
        others: Further types, next to :class:`~kd_lightning.errors.UserError` that report a user's mistake.
    """
    try:
        yield
    except BrokenPipeError:  # the reader, as head, has enough
        raise
    except Exception as error:
        message = user_message(error)
        if message is None:
            cause = find_cause(error, UserError, *others)
            message = str(cause) if isinstance(cause, UserError) else None if cause is None else one_line(cause)
        if message is None or os.environ.get("KD_LIGHTNING_TRACEBACK"):
            raise
        sys.exit(f"kd-lightning {command}: {message}")


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and all errors that it was raised from, each once: they may form a circle."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__


def innermost_cause(error: BaseException) -> BaseException:
    """Return the cause that all other errors of a chain were raised from."""
    return list(causes(error))[-1]


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, or the name of its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
