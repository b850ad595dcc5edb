"""The number of classes of a command's data, before its arguments are parsed."""

from argparse import ArgumentError
from pathlib import Path

import lightning.pytorch as pl
import yaml
from jsonargparse import ArgumentParser

from kd_lightning.errors import UserError, find_cause


def count_classes(words: list[str]) -> int | None:
    """Return the number of classes of the data that a command's arguments describe, by building the data module.

    Args:
        words: Arguments with recipes written out.

    Returns:
        ``None`` if no data module is named, it cannot be built, or it does not know its classes.

    Raises:
        UserError: If the data are not where they should be, or are unusable.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("-c", action="config")
    parser.add_subclass_arguments(pl.LightningDataModule, "data", fail_untyped=False, required=False)
    try:
        data = parser.instantiate_classes(parser.parse_args(_arguments_of_data(words))).get("data")
        count = getattr(data, "num_classes", None)
    except (ArgumentError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        if (cause := find_cause(error, UserError)) is not None:
            raise UserError(str(cause)) from error
        return None  # the command reports it, in better words
    return count if isinstance(count, int) else None


def _arguments_of_data(words: list[str]) -> list[str]:
    """Return those arguments that describe the data."""
    chosen: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, joined, value = word.partition("=")
        if flag in ("-c", "--config"):
            value = value if joined else next(rest, "")
            content = yaml.safe_load(value if "\n" in value else Path(value).read_text())
            if isinstance(content, dict) and content.get("data"):
                chosen += ["-c", yaml.safe_dump({"data": content["data"]})]
        elif flag == "--data" or flag.startswith("--data."):
            chosen += [word] if joined else [word, next(rest, "")]
    return chosen
