"""What may be said short on the command line, in full."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from kd_lightning.errors import UserError
from kd_lightning.recipes import recipe_files
from kd_lightning.runs.run import LOGS, Run


def expanded(arguments: list[str]) -> Iterator[str]:
    """Recipes by name become files, and ``--teacher`` the path of the teacher's checkpoint.

    Args:
        arguments: Of the command line, the command first.

    Raises:
        ValueError: If a name is neither a file nor a recipe, or nothing says what to test.
    """
    arguments = _with_config(arguments)
    last: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        flag, joined, value = argument.partition("=")
        if flag not in ("-c", "--config", "--teacher"):
            yield argument
            continue
        value = value if joined else next(rest, "")
        if flag == "--teacher":
            last.append(f"--model.teacher.path={value}")
        elif Path(value).is_file():
            yield from ("-c", value)
        elif (config := _trained_config(value, arguments)) is not None:
            yield from ("-c", str(config))
        else:
            for file in recipe_files(value):
                yield from ("-c", str(file))
            yield f"--trainer.logger.init_args.name={value}"
    yield from last


def _trained_config(recipe: str, arguments: list[str]) -> Path | None:
    """Of a run that is evaluated or goes on: the configuration with which it was trained, flags included."""
    checkpoint = _value_of("--ckpt_path", arguments)
    goes_on = arguments[0] == "fit" and checkpoint is not None
    flags = [argument.partition("=")[0] for argument in arguments]
    if any(flag.startswith("--trainer.logger") and flag.endswith(".version") for flag in flags):  # not the newest run
        return None
    if (arguments[0] in ("fit", "layers") and not goes_on) or checkpoint not in (None, "best", "last"):
        return None
    try:
        config = Run.newest_of(LOGS / recipe).config_file
    except FileNotFoundError:
        return None
    return config if config.is_file() else None


def _value_of(flag: str, arguments: list[str]) -> str | None:
    joined = [argument.removeprefix(f"{flag}=") for argument in arguments if argument.startswith(f"{flag}=")]
    return next(iter(joined + [value for name, value in pairwise(arguments) if name == flag]), None)


def _with_config(arguments: list[str]) -> list[str]:
    """A checkpoint alone brings the ``config.yaml`` of its run."""
    flags = {argument.partition("=")[0] for argument in arguments}
    if arguments[0] in ("fit", "layers") or flags & {"-c", "--config", "-h", "--help", "--model", "--print_config"}:
        return arguments
    checkpoint = _value_of("--ckpt_path", arguments)
    run = None if checkpoint is None else Run.of_checkpoint(checkpoint)
    if run is None:
        raise UserError("No model is named; add -c with a recipe or the config.yaml of a run.")
    rank_zero_only(print)(f"The configuration is {run.config_file}.")
    return [arguments[0], "-c", str(run.config_file), *arguments[1:]]
