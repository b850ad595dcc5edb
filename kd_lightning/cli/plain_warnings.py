"""Shows the warnings of this package as a user reads them: without the place in our source."""

import warnings
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def show_plain_warnings() -> None:
    """Leave out file and line of this package's warnings, which say what to do; call it after Lightning is imported.

    Lightning sets a format of its own when it is imported, to which the warnings of all others are left.
    """
    others = warnings.formatwarning
    if getattr(others, "is_plain", False):
        return

    def format_plainly(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if issubclass(category, UserWarning) and Path(filename).is_relative_to(_PACKAGE):
            return f"Warning: {message}\n"
        return others(message, category, filename, lineno, line)

    format_plainly.is_plain = True  # type: ignore[attr-defined]
    warnings.formatwarning = format_plainly
