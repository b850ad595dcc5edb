"""Opens the run or checkpoint that a command is given, and says what was imported for it."""

from kd_lightning.cli.echo import echo
from kd_lightning.runs.source import Source


def open_source(name: str, *, trust: bool = False) -> Source:
    """Open a run or a checkpoint as :class:`~kd_lightning.runs.source.Source`, and print what it imported.

    Args:
        name: A run's folder, a recipe or a checkpoint file.
        trust: Import whatever a checkpoint file names.
    """
    source = Source(name, trust=trust)
    source.checkpoint  # noqa: B018 - opened, to report what that imports
    echo_imported(name, source.imported)
    return source


def echo_imported(name: str, packages: list[str]) -> None:
    """Print which packages were imported because a run or a checkpoint names them, if there are any.

    Args:
        name: The run or checkpoint.
        packages: The packages.
    """
    if packages:
        echo(f"Imported {', '.join(packages)}, which {name} names.")
