"""`kd-lightning compare`."""

from pathlib import Path
from typing import Any

from kd_lightning.cli.tables import print_table
from kd_lightning.errors import MissingFileError, UserError
from kd_lightning.files.atomic import atomic_write
from kd_lightning.runs.run import Run


def compare(runs: list[str], output: str | None = None) -> None:
    """Print a table of runs that were tested: parameters, file size, accuracy, agreement, images per second.

    Where an image may have several classes, the accuracy is the mean average precision, marked as mAP.

    Args:
        runs: Folders of runs, or recipes (their newest run); each must have been tested.
        output: A file to write the table to, as Markdown.

    Raises:
        FileNotFoundError: If a run was not tested yet.
    """
    from rich.table import Table

    rows = [_row(run) for run in runs]
    titles = ["run", "parameters", "file (MB)", "test accuracy", "agreement", "images/s"]
    table = Table()
    for title in titles:
        table.add_column(title, justify="left" if title == "run" else "right", no_wrap=title == "run")
    for row in rows:
        table.add_row(*row)
    print_table(table)
    if output is not None:
        lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
        with atomic_write(Path(output)) as file:
            file.write("".join(f"| {' | '.join(line)} |\n" for line in lines).encode())
        print(f"The table is in {output}.")


def _row(run: str) -> list[str]:
    found = Run.find(run)
    metrics = found.test
    if metrics is None:
        raise MissingFileError(
            f"The run {str(found.folder)!r} is not tested yet; run `kd-lightning test -c {found.config_file}`."
        )
    try:
        return [run, *_cells(metrics)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(found.test_file)!r} is damaged; run `kd-lightning test -c {found.config_file}` to write it again."
        ) from error


def _cells(metrics: dict[str, Any]) -> list[str]:
    size, agreement = metrics.get("file_bytes"), metrics.get("agreement")
    return [
        f"{metrics['parameters']:,}",
        "-" if size is None else f"{size / 1e6:.3f}",
        f"{metrics['map']:.2%} mAP" if "map" in metrics else f"{metrics['accuracy']:.2%}",
        "-" if agreement is None else f"{agreement:.2%}",
        f"{metrics['images_per_second']:,.0f}",
    ]
