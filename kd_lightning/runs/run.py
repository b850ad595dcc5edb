"""Where runs keep their checkpoints, ; imports no torch."""

from pathlib import Path
from typing import Any

import yaml

from kd_lightning.errors import MissingFileError, UserError

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
        raise MissingFileError(f"{str(run)!r} holds no {which!r} checkpoint; give the path of a file to --ckpt_path.")
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
        raise MissingFileError(f"{str(logs)!r} holds no finished run; run `kd-lightning fit` first, or name a file.")
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
        raise UserError(f"{str(file)!r} is damaged: it is not the configuration of a run; restore it, or train again.")
    return said
