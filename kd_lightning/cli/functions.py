"""Commands that are a function of the same name in a module of the same name."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any


def parse_function(command: str, words: Sequence[str]) -> tuple[Callable[..., None], dict[str, Any]]:
    """Return the function of a command, and its arguments.

    Args:
        command: For example ``"export"``.
        words: Words of the command line after the command.

    Raises:
        UserError: If the function does not take them.
    """
    from jsonargparse import ArgumentParser

    from kd_lightning.cli.parse_errors import explain_parse_errors

    function: Callable[..., None] = getattr(import_module(f"kd_lightning.cli.{command}"), command)
    kinds = function.__annotations__
    lists = [name for name, kind in kinds.items() if kind == list[str]]
    flags = [name for name, kind in kinds.items() if kind is bool]
    parser = ArgumentParser(
        prog=f"kd-lightning {command}",
        description=(function.__doc__ or "").partition("\n")[0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_function_arguments(function, as_positional=True, skip={*lists, *flags})
    for name in lists:  # plain words, where jsonargparse would want one [a, b]
        parser.add_argument(name, nargs="+", type=str)
    for name in flags:
        parser.add_argument(f"--{name}", action="store_true")
    with explain_parse_errors([parser]):
        options = parser.parse_args(["--output" if word == "-o" else word for word in words])
    return function, options.as_dict()
