"""Imports libraries of the optional extras."""

from importlib import import_module
from types import ModuleType

from kd_lightning.errors import UserError


def require_extra(name: str, *, extra: str = "export") -> ModuleType:
    """Import a library of an extra.

    Args:
        name: Name of the library.
        extra: Name of the extra that installs it.

    Raises:
        UserError: If it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"{error.name} of the extra `{extra}` is not installed; run "
            f'`pip install ".[{extra}]"` in a checkout of kd_lightning.'
        ) from error
