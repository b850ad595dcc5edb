"""Checks of the arguments of losses."""

from kd_lightning.errors import UserError


def check_positive(**values: float) -> None:
    """Raise if a number is not above 0.

    Args:
        **values: Arguments by name.

    Raises:
        UserError: With the name of the first that is not.
    """
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{name} must be above 0, got {value}.")


def check_fraction(**values: float) -> None:
    """Raise if a number is not in [0, 1].

    Args:
        **values: Arguments by name.

    Raises:
        UserError: With the name of the first that is not.
    """
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name} must be in [0, 1], got {value}.")
