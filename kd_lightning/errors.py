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


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error's message, or its type's name where it has none.

    Example:
        >>> first_line(ValueError("one line.\nanother"))
        'one line'
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
