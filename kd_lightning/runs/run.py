"""A training run: its folder, and what is found there. Importable without torch."""

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml

from kd_lightning.errors import MissingFileError, UserError
from kd_lightning.recipes import recipe_names

if TYPE_CHECKING:
    from torch import Tensor

    from kd_lightning.checkpoints.checkpoint import Checkpoint
    from kd_lightning.data.module import ImageDataModule

LOGS = Path("lightning_logs")
"""Where Lightning writes, relative to the working folder."""
CONFIG = "config.yaml"
FIT, TEST = "fit.json", "test.json"
CHECKPOINTS = "checkpoints"
BEST, LAST = "best", "last"
PUBLISHED = "published"
"""The folder in ``LOGS`` that git keeps: configurations and figures of runs, without weights."""


class Run:
    """A training run of the command line or of :func:`kd_lightning.distill`.

    Args:
        folder: The folder that holds ``checkpoints/``, ``fit.json``, once it was tested ``test.json``, and of a run of
            the command line ``config.yaml``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "test.json").write_text('{"accuracy": 0.953}')
        ...     run = Run.find(folder)
        ...     print(run.test, run.fit)
        {'accuracy': 0.953} None

    The network of the newest run of a recipe, and of a run in Python, whose networks are not described in files::

        network = Run.find("digits/distill").best.network()
        network = Run.find("distill").best.network(into=resnet20())
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @classmethod
    def find(cls, name: str | Path) -> Self:
        """Return the run that a user means.

        Args:
            name: A run's folder; a folder of runs or a recipe, for its newest run; or a checkpoint of a run.

        Raises:
            FileNotFoundError: If there is no such run.
        """
        path = Path(name).expanduser()
        if path.is_file():
            run = cls.of_checkpoint(path)
            if run is None:
                raise MissingFileError(f"{str(name)!r} is not in the {CHECKPOINTS} folder of a run; name a run.")
            return run
        for folder in (path, LOGS / path):
            if any((folder / part).exists() for part in (CHECKPOINTS, CONFIG, TEST)):
                return cls(folder)
            with suppress(MissingFileError):
                return cls.newest_of(folder)
        if str(name) in recipe_names():
            raise MissingFileError(
                f"The recipe '{name}' is not trained yet; run `kd-lightning fit -c {name}` first, or "
                f"{_named_runs(LOGS / path) or f'name the folder of a run that is not in {LOGS / path}'}."
            )
        raise MissingFileError(
            f"There is no checkpoint, run or trained recipe {str(name)!r}; check the name, or "
            f"{_named_runs(path) or 'train it first'}."
        )

    @classmethod
    def all_below(cls, folder: str | Path) -> list[Self]:
        """Return all runs in a folder and in those below it, sorted by their folders; links are not followed."""
        found = []
        for place, folders, files in os.walk(folder):
            if CHECKPOINTS in folders or {CONFIG, FIT, TEST} & set(files):
                found.append(cls(place))
                folders[:] = [] if Path(place) != Path(folder) else [name for name in folders if name != CHECKPOINTS]
        return sorted(found, key=lambda run: _numbered(run.folder))

    @property
    def is_published(self) -> bool:
        """Return whether git keeps the run's configuration and figures."""
        parents = self.folder.absolute().parents
        return any(folder.name == PUBLISHED and folder.parent.name == LOGS.name for folder in parents)

    @classmethod
    def newest_of(cls, folder: str | Path) -> Self:
        """Return the last of the runs ``version_0``, ``version_1``, ... of a folder that have checkpoints.

        Raises:
            FileNotFoundError: If there is none.
        """
        versions = {
            int(run.name.removeprefix("version_")): run
            for run in Path(folder).expanduser().glob("version_*")
            if run.name.removeprefix("version_").isdecimal() and any((run / CHECKPOINTS).glob("*.ckpt"))
        }
        if not versions:
            raise MissingFileError(
                f"{str(folder)!r} does not contain a run with checkpoints; train one first, or "
                f"{_named_runs(Path(folder)) or 'name a file'}."
            )
        return cls(versions[max(versions)])

    @classmethod
    def of_checkpoint(cls, path: str | Path) -> Self | None:
        """Return the run that a checkpoint belongs to, or ``None`` for a file that was moved out of its run."""
        folder = Path(path).parent
        return cls(folder.parent) if folder.name == CHECKPOINTS and (folder.parent / CONFIG).is_file() else None

    @property
    def config_file(self) -> Path:
        """Return the path of ``config.yaml``, which may not exist."""
        return self.folder / CONFIG

    @property
    def fit_file(self) -> Path:
        """Return the path of ``fit.json``, which may not exist."""
        return self.folder / FIT

    @property
    def test_file(self) -> Path:
        """Return the path of ``test.json``, which may not exist."""
        return self.folder / TEST

    @property
    def config(self) -> dict[str, Any]:
        """Return the configuration that the run was trained with.

        Raises:
            FileNotFoundError: If the run has no ``config.yaml``.
            ValueError: If the file is not the configuration of a run.
        """
        try:
            config = yaml.safe_load(self.config_file.read_bytes())
        except FileNotFoundError as error:
            raise MissingFileError(f"The run {str(self.folder)!r} has no {CONFIG}; restore it.") from error
        except yaml.YAMLError:
            config = None
        if not isinstance(config, dict) or not all(
            isinstance(config.get(key) or {}, dict) for key in ("model", "data")
        ):
            raise UserError(
                f"{str(self.config_file)!r} is damaged: it is not the configuration of a run; restore it, or train "
                "again."
            )
        return config

    @property
    def has_checkpoints(self) -> bool:
        """Return whether the run has a folder for checkpoints."""
        return (self.folder / CHECKPOINTS).is_dir()

    @property
    def checkpoints(self) -> list[Path]:
        """Return all checkpoints, the oldest first."""
        return sorted((self.folder / CHECKPOINTS).glob("*.ckpt"), key=lambda file: file.stat().st_mtime)

    def checkpoint(self, which: str) -> Path:
        """Return the newest checkpoint whose file name begins with ``which``.

        Raises:
            FileNotFoundError: If there is none.
        """
        found = [file for file in self.checkpoints if file.name.startswith(which)]
        if not found:
            raise MissingFileError(
                f"The run {str(self.folder)!r} does not have a {which!r} checkpoint; name the file of a checkpoint."
            )
        return found[-1]

    @property
    def best_file(self) -> Path:
        """Return the path of the checkpoint of the best epoch on the validation images.

        Raises:
            FileNotFoundError: If there is none.
        """
        return self.checkpoint(BEST)

    @property
    def last_file(self) -> Path:
        """Return the path of the newest checkpoint of the last epoch or step.

        Raises:
            FileNotFoundError: If there is none.
        """
        return self.checkpoint(LAST)

    @property
    def best(self) -> "Checkpoint":
        """Open the checkpoint of the best epoch, which may name what ``config.yaml`` names: a run is a program.

        Raises:
            FileNotFoundError: If the run has no best checkpoint.
            ValueError: If the checkpoint is damaged, or ``config.yaml`` names a class that does not exist.
        """
        return self._open(self.best_file)

    @property
    def last(self) -> "Checkpoint":
        """Open the newest checkpoint of the last epoch or step, as :attr:`best` does."""
        return self._open(self.last_file)

    def newest_checkpoint(self, on_damaged: Callable[[str], object] | None = None) -> "Checkpoint | None":
        """Open the checkpoint of the most training steps; return ``None`` if no checkpoint can be read.

        Args:
            on_damaged: Called with a sentence for each damaged checkpoint, which is skipped.
        """
        from kd_lightning.checkpoints.checkpoint import Checkpoint

        newest: Checkpoint | None = None
        for file in self.checkpoints:
            try:
                opened = Checkpoint.of_run(file)
            except UserError as error:
                if on_damaged is not None:
                    on_damaged(str(error))
                continue
            if newest is None or opened.global_step >= newest.global_step:  # of equal steps, the file written last
                newest = opened
        return newest

    @property
    def test(self) -> dict[str, Any] | None:
        """Return the metrics of the run's test, or ``None`` if it was not tested.

        Raises:
            ValueError: If ``test.json`` is damaged.
        """
        metrics = _read_json(self.test_file)
        if metrics is not None and not metrics:
            raise UserError(
                f"{str(self.test_file)!r} is damaged; run `kd-lightning test -c {self.config_file}` to write it again."
            )
        return metrics

    @property
    def fit(self) -> dict[str, Any] | None:
        """Return what the training has reached and cost so far, or ``None`` if the run does not say so.

        For the command line these are the validation metrics of the best epoch (``val``), ``epochs``, ``steps``,
        whether the training is ``finished``, the ``cost`` in seconds, and the files of the ``teachers``.

        Raises:
            ValueError: If ``fit.json`` is damaged.
        """
        found = _read_json(self.fit_file)
        if found is not None and not found:
            raise UserError(f"{str(self.fit_file)!r} is damaged; delete it, or resume the run to write it again.")
        return found

    def data(self) -> "ImageDataModule | None":
        """Return the run's data module before ``setup``, or ``None`` if it is not one of kd_lightning.

        Raises:
            ValueError: If it cannot be built, for example because its class cannot be imported.
        """
        from kd_lightning.runs.rebuild import build_data

        config = self.config.get("data") if self.config_file.is_file() else None
        data: ImageDataModule | None = build_data(config, self) if config else None
        return data

    def images(self, split: str, *, count: int | None = None) -> "tuple[Tensor, Tensor] | None":
        """Return images of a split, not augmented and not normalized, and their labels.

        Args:
            split: ``"train"``, which is shuffled, ``"val"`` or ``"test"``.
            count: Maximum number of images; ``None`` for all.

        Returns:
            Floats in [0, 1], shape ``(N, channels, H, W)``, and labels, shape ``(N,)``; ``None`` if the data module is
            not one of kd_lightning or the image files no longer exist.
        """
        from kd_lightning.checkpoints.checkpoint import Checkpoint
        from kd_lightning.runs.rebuild import load_images

        data = self.data()
        if data is None:
            return None
        with suppress(MissingFileError):
            Checkpoint(self.best_file).restore_data(data)
        return load_images(data, split, count)

    def _open(self, file: Path) -> "Checkpoint":
        from kd_lightning.checkpoints.checkpoint import Checkpoint
        from kd_lightning.checkpoints.trust import import_classes

        named = self.configuration if self.config_file.is_file() else {}
        return Checkpoint(file, trusted=import_classes(named, str(self.config_file)))

    @property
    def configuration(self) -> dict[str, Any]:
        """Return the sections ``model`` and ``data`` of :attr:`config`, from which the run can be rebuilt."""
        return {name: self.config.get(name) or {} for name in ("model", "data")}


def _read_json(file: Path) -> dict[str, Any] | None:
    """Return the content of a file, ``None`` where there is none, and nothing where it is damaged."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError):
        content = None
    return content if isinstance(content, dict) else {}


def _numbered(folder: Path) -> list[tuple[str, int]]:
    """Return the parts of a path in an order in which ``version_9`` comes before ``version_10``."""
    parts = (re.fullmatch(r"(.*?)(\d*)", part, re.DOTALL) for part in folder.parts)
    return [(part[1], int(part[2] or -1)) for part in parts if part]


def _named_runs(folder: Path) -> str:
    """Return the advice to name one of the runs in a folder whose names are not version_0, version_1, ..."""
    runs = sorted({str(file.parent.parent) for file in folder.glob(f"*/{CHECKPOINTS}/*.ckpt")})
    return f"name {' or '.join(runs)}" if runs else ""


def find_checkpoint(name: str | Path) -> Path:
    """Return the checkpoint that a user means: a file itself, or the best checkpoint of :meth:`Run.find`.

    Raises:
        FileNotFoundError: If there is no such file or run.
    """
    path = Path(name).expanduser()
    return path if path.is_file() else Run.find(name).best_file
