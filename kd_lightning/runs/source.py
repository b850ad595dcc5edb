"""Models that commands are given: the name of a run, which is a program, or a checkpoint file, which is data."""

from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from kd_lightning.checkpoints.checkpoint import Checkpoint
from kd_lightning.checkpoints.described import rebuild_data, rebuild_network
from kd_lightning.checkpoints.trust import imported_packages
from kd_lightning.data.protocol import is_image_data
from kd_lightning.runs.moved import moved_file
from kd_lightning.runs.rebuild import load_images
from kd_lightning.runs.run import Run


class Source:
    """A trained network, and the data and the teacher that it was trained with.

    Of a run named by its folder or recipe, what its ``config.yaml`` names is imported. Of a file, even one inside a
    run's folder, only the file itself is read, and only what a checkpoint may name is imported.

    Args:
        name: A run's folder, a recipe (for its newest run), or a checkpoint file.
        trust: Import whatever the checkpoint names.

    Raises:
        MissingFileError: If there is no such run or file.

    Attributes:
        path: Path of the checkpoint.
        run: The run that it belongs to, for its results; ``None`` for a file that was moved out of its run.
    """

    def __init__(self, name: str | Path, *, trust: bool = False) -> None:
        path = Path(name).expanduser()
        self._program = None if path.is_file() else Run.find(path)
        self._trust = trust
        self.path = path if self._program is None else self._program.best_file
        self.run = self._program or Run.of_checkpoint(self.path)

    @property
    def is_run(self) -> bool:
        """Return whether a run was named, whose ``config.yaml`` says what may be imported."""
        return self._program is not None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, which is opened when it is first used.

        Raises:
            UserError: If it is damaged, or names a class that does not exist.
        """
        opened = self._program.best if self._program else Checkpoint(self.path)
        if self._trust:
            opened.trust()
        return opened

    @property
    def imported(self) -> list[str]:
        """Return the packages outside torch, torchvision and kd_lightning that were imported for it."""
        return imported_packages(self.checkpoint.trusted if "checkpoint" in vars(self) else ())

    @cached_property
    def data(self) -> Any:
        """The data module before ``setup``; ``None`` if it is not one of kd_lightning, or not known."""
        data = rebuild_data(self.checkpoint) if self._program is None else self._program.data()
        if not is_image_data(data):
            return None
        self.checkpoint.restore_data(data)
        return data

    def images(self, split: str, *, count: int | None = None) -> tuple[Tensor, Tensor] | None:
        """Return images of a split and their labels, as :meth:`Run.images` does."""
        return None if self.data is None else load_images(self.data, split, count)

    def network(self) -> nn.Module:
        """Return the network with its weights, in eval mode."""
        return self.checkpoint.network()

    @property
    def teacher_path(self) -> Path | None:
        """Return the file of a distilled run's teacher; its own checkpoint if the teacher has none, else ``None``."""
        described = self._described_teacher
        if described is None:
            return None
        return Path((described.get("init_args") or {}).get("path") or self.path).expanduser()

    def teacher(self) -> nn.Module | None:
        """Return the teacher of a distilled run, or ``None`` if there was none or its file does not exist.

        Raises:
            UserError: If its file is damaged, or the checkpoint names classes for it that are not trusted.
        """
        described = self._described_teacher
        if described is not None and not Path(str(self.teacher_path)).is_file():
            described = self._moved(described)
        with suppress(OSError):
            return None if described is None else rebuild_network(self.checkpoint, described)
        return None

    def _moved(self, described: dict[str, Any]) -> dict[str, Any]:
        """Return the description of a teacher with the path at which its file is now, if it was moved."""
        arguments = described.get("init_args") or {}
        path = moved_file(str(arguments.get("path")), self.run)
        if path is None:
            return described
        rank_zero_info(f"{arguments['path']} has moved: {path} has the same digest.")
        return {**described, "init_args": {**arguments, "path": str(path)}}

    @property
    def _described_teacher(self) -> dict[str, Any] | None:
        described = self.checkpoint.hyper_parameters.get("teacher")
        if self._program is not None and self._program.config_file.is_file():  # where its path can be corrected
            described = (self._program.configuration["model"].get("init_args") or {}).get("teacher")
        return described if isinstance(described, dict) else None
