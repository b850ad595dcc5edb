"""Where runs keep their checkpoints, and the comparison of tested runs; imports no torch."""

import json
from pathlib import Path
from typing import Any

import yaml

from kd_lightning.whole_files import whole_file

LOGS = Path("lightning_logs")


def resolve_checkpoint(which: str, run: Path) -> Path:
    """The ``best`` or ``last`` checkpoint of a run.

    Args:
        which: ``"best"`` or ``"last"``.
        run: The folder that holds ``checkpoints/``.

    Raises:
        FileNotFoundError: If the run has none.
    """
    found = sorted((run / "checkpoints").glob(f"{which}*.ckpt"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{str(run)!r} holds no {which!r} checkpoint; give the path of a file to --ckpt_path.")
    return found[-1]


def newest_run(logs: Path) -> Path:
    """The last of the folders ``version_0``, ``version_1`` ... that holds checkpoints.

    Raises:
        FileNotFoundError: If there is none.
    """
    runs = [
        run
        for run in logs.glob("version_*")
        if run.name.removeprefix("version_").isdecimal() and any((run / "checkpoints").glob("*.ckpt"))
    ]
    if not runs:
        raise FileNotFoundError(f"{str(logs)!r} holds no finished run; run `kd-lightning fit` first, or name a file.")
    return max(runs, key=lambda run: int(run.name.removeprefix("version_")))


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in, or ``None`` for a file that was moved elsewhere."""
    folder = checkpoint.parent
    return folder.parent if folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file() else None


def configuration(run: Path) -> dict[str, Any]:
    """What the ``config.yaml`` of a run says.

    Raises:
        ValueError: If it is no configuration.
    """
    file = run / "config.yaml"
    try:
        said = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError:
        said = None
    if not isinstance(said, dict) or not all(isinstance(said.get(part) or {}, dict) for part in ("model", "data")):
        raise ValueError(f"{str(file)!r} is damaged: it is not the configuration of a run; restore it, or train again.")
    return said


def compare(runs: list[str], output: str | None = None) -> None:
    """Print a table of runs that were tested: parameters, file size, accuracy, agreement, images per second.

    Args:
        runs: Folders of runs, or recipes (their newest run); each must have been tested.
        output: A file to write the table to, as Markdown.

    Raises:
        FileNotFoundError: If a run was not tested yet.
    """
    from rich.console import Console
    from rich.table import Table

    rows = [_row(run) for run in runs]
    titles = ["run", "parameters", "file (MB)", "test accuracy", "agreement", "images/s"]
    table = Table()
    for title in titles:
        table.add_column(title, justify="left" if title == "run" else "right", no_wrap=title == "run")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if output is not None:
        lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
        with whole_file(Path(output)) as file:
            file.write("".join(f"| {' | '.join(line)} |\n" for line in lines).encode())
        print(f"The table is in {output}.")


def _row(run: str) -> list[str]:
    folder = Path(run)
    if not (folder / "test.json").is_file() and not (folder / "checkpoints").is_dir():
        folder = newest_run(folder if folder.is_dir() else LOGS / run)
    if not (folder / "test.json").is_file():
        raise FileNotFoundError(f"{str(folder)!r} was not tested yet; run `kd-lightning test -c {folder}/config.yaml`.")
    try:
        return [run, *_cells(json.loads((folder / "test.json").read_text()))]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{str(folder / 'test.json')!r} is damaged; run `kd-lightning test -c {folder}/config.yaml` again."
        ) from error


def _cells(figures: dict[str, Any]) -> list[str]:
    size, agreement = figures.get("file_bytes"), figures.get("agreement")
    return [
        f"{figures['parameters']:,}",
        "-" if size is None else f"{size / 1e6:.3f}",
        f"{figures['accuracy']:.2%}",
        "-" if agreement is None else f"{agreement:.2%}",
        f"{figures['images_per_second']:,.0f}",
    ]
