"""Short forms of arguments, written out for LightningCLI."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from kd_lightning.cli.echo import echo
from kd_lightning.errors import MissingFileError, UserError
from kd_lightning.recipes import recipe_texts
from kd_lightning.runs.run import BEST, LAST, LOGS, Run


def expand_arguments(arguments: list[str]) -> Iterator[str]:
    """Replace names of recipes by files, and ``--teacher`` by the path in the teacher's configuration.

    Args:
        arguments: Words of the command line, the command first.

    Raises:
        ValueError: If a name is neither a file nor a recipe, or no configuration is named.
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
        elif "\n" in value or Path(value).is_file():  # a recipe's text: Lightning starts further ranks with our words
            yield from ("-c", value)
        elif (config := _trained_config(value, arguments)) is not None:
            yield from ("-c", str(config))
        else:
            for text in recipe_texts(value):
                yield from ("-c", text)
            yield f"--trainer.logger.init_args.name={value}"
    yield from last


def _trained_config(recipe: str, arguments: list[str]) -> Path | None:
    """Return the configuration, flags included, of the run of a recipe that is evaluated or resumed."""
    checkpoint = _value_of("--ckpt_path", arguments)
    resumes = arguments[0] == "fit" and checkpoint is not None
    flags = [argument.partition("=")[0] for argument in arguments]
    if any(flag.startswith("--trainer.logger") and flag.endswith(".version") for flag in flags):  # not the newest run
        return None
    if (arguments[0] in ("fit", "layers") and not resumes) or checkpoint not in (None, BEST, LAST):
        return None
    try:
        config = Run.newest_of(LOGS / recipe).config_file
    except MissingFileError:
        return None
    return config if config.is_file() else None


def _value_of(flag: str, arguments: list[str]) -> str | None:
    joined = [argument.removeprefix(f"{flag}=") for argument in arguments if argument.startswith(f"{flag}=")]
    return next(iter(joined + [value for name, value in pairwise(arguments) if name == flag]), None)


def _with_config(arguments: list[str]) -> list[str]:
    """Add the ``config.yaml`` of a checkpoint's run where only the checkpoint is named."""
    flags = {argument.partition("=")[0] for argument in arguments}
    if arguments[0] in ("fit", "layers") or flags & {"-c", "--config", "-h", "--help", "--model", "--print_config"}:
        return arguments
    checkpoint = _value_of("--ckpt_path", arguments)
    run = None if checkpoint is None else Run.of_checkpoint(checkpoint)
    if run is None:
        raise UserError("No model is named; add -c with a recipe or the config.yaml of a run.")
    echo(f"The configuration is {run.config_file}.")
    return [arguments[0], "-c", str(run.config_file), *arguments[1:]]
