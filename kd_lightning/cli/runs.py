"""`kd-lightning runs`: lists runs, and deletes those that are asked for; imports no torch."""

import argparse
import shutil
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path

from kd_lightning.cli.tables import print_table
from kd_lightning.errors import MissingFileError, UserError
from kd_lightning.files.byte_count import describe_bytes
from kd_lightning.runs.run import CHECKPOINTS, CONFIG, FIT, LOGS, TEST, Run

_WRITTEN: tuple[str, ...] = (
    CHECKPOINTS,
    CONFIG,
    FIT,
    TEST,
    "hparams.yaml",
    "events.out.tfevents.*",
    "version_*",
    "*.csv",
    "*.npz",
)
_WRITTEN += ("*.safetensors", "*.onnx", "*.png", "*.svg", "*.tmp")
"""What a run writes into its folder; with anything else in it, a folder is not deleted."""


def runs(arguments: Sequence[str]) -> None:
    """List the runs in a folder, or delete runs.

    Args:
        arguments: A folder, ``lightning_logs`` by default, or ``--delete`` with folders of runs.

    Raises:
        MissingFileError: If there is no such folder or run.
        UserError: If a run that is to be deleted is published, or its folder contains anything else.
    """
    options = argument_parser().parse_args(arguments)
    if options.delete:
        _delete(options.delete, options.folder)
    else:
        _list(options.folder)


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's words."""
    parser = argparse.ArgumentParser(
        prog="kd-lightning runs",
        description="List the runs in a folder with their validation and test accuracy, or delete runs.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", nargs="?", type=Path, default=LOGS, help="the folder of the runs (lightning_logs)")
    parser.add_argument("--delete", nargs="+", metavar="RUN", help="delete these runs, named as in the list")
    return parser


def _list(folder: Path) -> None:
    if not folder.is_dir():
        raise MissingFileError(f"There is no folder {str(folder)!r}; name the folder of your runs, or train one first.")
    found = Run.all_below(folder)
    shown = [run for run in found if not run.is_published]
    if shown:
        from rich.table import Table

        table = Table()
        for title in ("run", "date", "epochs", "val", "test", "size"):
            table.add_column(title, justify="left" if title in ("run", "date") else "right", no_wrap=True)
        problems: list[str] = []
        for run in shown:
            table.add_row(*_row(run, folder, problems))
        print_table(table)
        for problem in problems:
            print(problem)
    published = len(found) - len(shown)
    if published:
        print(f"{published} published runs are in {LOGS / 'published'}; their figures are in the README.")
    if not found:
        print(f"There are no runs in {folder}; `kd-lightning fit -c digits/teacher` trains one.")


def _row(run: Run, folder: Path, problems: list[str]) -> list[str]:
    """Return the cells of a run; what is damaged is described below the table."""
    fit, test = {}, {}
    try:
        fit, test = run.fit or {}, run.test or {}
        if run.config_file.is_file() or not fit:  # a run in Python has none
            _ = run.config
    except UserError as error:
        problems.append(str(error))
    if not run.checkpoints:
        problems.append(f"{str(run.folder)!r} has no checkpoints; train it again, or delete it.")
    epochs = str(fit.get("epochs", "-"))
    if not fit.get("finished", True):
        epochs += f" of {fit.get('planned_epochs', '?')}"
    return [
        run.folder.relative_to(folder).as_posix(),
        _date(run),
        epochs,
        _percent(fit.get("val")),
        _percent(test),
        describe_bytes(_size(run.folder)),
    ]


def _percent(metrics: object) -> str:
    """Return the accuracy, or the mean average precision of several classes an image."""
    for name, mark in {"accuracy": "", "map": " mAP"}.items():
        value = metrics.get(name) if isinstance(metrics, dict) else None
        if isinstance(value, int | float):
            return f"{value:.2%}{mark}"
    return "-"


def _date(run: Run) -> str:
    """Return when the run last wrote a checkpoint, or its folder."""
    changed = (run.checkpoints or [run.folder])[-1].stat().st_mtime
    return datetime.fromtimestamp(changed).strftime("%Y-%m-%d %H:%M")


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(OSError):  # removed meanwhile
            total += file.lstat().st_size if not file.is_dir() else 0
    return total


def _delete(names: Sequence[str], folder: Path) -> None:
    """Delete runs, after all of them were checked."""
    chosen = list(dict.fromkeys(_named(name, folder) for name in names))
    for run in chosen:
        _check_deletable(run)
    for run in chosen:
        freed = _size(run)
        run.unlink() if run.is_symlink() else shutil.rmtree(run)
        print(f"Deleted {run} ({describe_bytes(freed)}).")


def _named(name: str, folder: Path) -> Path:
    path = Path(name).expanduser()
    for place in (folder / path, path):
        if place.is_dir():
            return place
    raise MissingFileError(f"There is no run {name!r}; `kd-lightning runs` lists those that can be deleted.")


def _check_deletable(folder: Path) -> None:
    run = Run(folder)
    if run.is_published:
        raise UserError(f"{str(folder)!r} is published with the README, so it is kept; use git to remove it.")
    if not any((folder / part).exists() for part in (CHECKPOINTS, CONFIG, FIT, TEST)):
        inside = Run.all_below(folder)
        advice = f"name one of its {len(inside)} runs, as {str(inside[-1].folder)!r}" if inside else "check the name"
        raise UserError(f"{str(folder)!r} is not a run; {advice}.")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(f"{str(folder)!r} is the folder that you are in, so it is not deleted; leave it first.")
    others = [file.name for file in sorted(folder.iterdir()) if not any(fnmatch(file.name, kind) for kind in _WRITTEN)]
    if others:
        raise UserError(
            f"{str(folder)!r} also holds {others[0]!r}, which no run has written; move or delete that first."
        )
