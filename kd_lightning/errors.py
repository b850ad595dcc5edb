"""Errors that users make."""


class UserError(ValueError):
    """A mistake that the user can correct: one sentence that says what is wrong, what was expected and what to do.

    The command line prints the sentence. Every other error is a bug and shows its traceback.
    """


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist."""


class WriteError(UserError, OSError):
    """A file cannot be written."""


class DownloadError(UserError, ConnectionError):
    """A file can be neither found nor downloaded."""


class OutputExistsError(UserError, FileExistsError):
    """A file that would be written exists already."""


def add_user_message(error: BaseException, message: str) -> None:
    """Attach a sentence for the user to an error of another package.

    The command line prints it instead of the traceback; Python prints it below the traceback.

    Args:
        error: Error that is being raised.
        message: Sentence that says what is wrong and what to do.
    """
    error.add_note(message)
    error.kd_lightning_message = message  # type: ignore[attr-defined]


def user_message(error: BaseException) -> str | None:
    """Return the sentence that :func:`add_user_message` attached to an error, or ``None``.

    Example:
        >>> error = RuntimeError("out of memory")
        >>> add_user_message(error, "Lower batch_size.")
        >>> user_message(error)
        'Lower batch_size.'
    """
    return getattr(error, "kd_lightning_message", None)


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error's message, or its type's name where it has none.

    Example:
        >>> first_line(ValueError("one line.\nanother"))
        'one line'
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def find_cause(error: BaseException, *types: type[Exception]) -> BaseException | None:
    """Return the first of an error and its causes that has one of the types, or ``None``."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, types):
        cause = cause.__cause__
    return cause
