"""Imports libraries of the optional extra."""

from importlib import import_module
from types import ModuleType

from kd_lightning.errors import UserError


def require_extra(name: str) -> ModuleType:
    """Import a library of the extra ``export``.

    Raises:
        UserError: If it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"{error.name} of the extra `export` is not installed; run "
            '`pip install ".[export]"` in a checkout of kd_lightning.'
        ) from error
