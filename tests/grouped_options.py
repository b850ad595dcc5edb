"""Options of data modules in tests, written flat."""

from dataclasses import fields
from typing import Any

from kd_lightning.data import Augmentation


def grouped(**options: Any) -> dict[str, Any]:
    """Return the options with those of the augmentation as one."""
    names = {field.name for field in fields(Augmentation)} & options.keys()
    rest = {name: value for name, value in options.items() if name not in names}
    return rest | ({"augmentation": Augmentation(**{name: options[name] for name in names})} if names else {})
