"""A checkpoint file: opened once, checked once."""

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from kd_lightning.checkpoints.trust import check_trusted_classes, import_classes, resolve
from kd_lightning.errors import UserError
from kd_lightning.files.digest import sha256
from kd_lightning.files.format import KEY, check_format
from kd_lightning.files.read import read_checkpoint
from kd_lightning.networks.data_config import DataConfig
from kd_lightning.networks.weights import from_checkpoint


class Checkpoint:
    """The content of a checkpoint, read as tensors and plain data on the CPU.

    Args:
        path: A checkpoint of a run, or any published state dict (``.ckpt .pt .pth .th .safetensors``).
        trusted: Import paths of further classes and functions that it may name, for example those in the
            ``config.yaml`` of its run.

    Raises:
        MissingFileError: If there is no such file.
        UserError: If the file is damaged, contains code, or was written by another version of kd_lightning.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": nn.Linear(2, 3).state_dict()}, f"{folder}/weights.ckpt")
        ...     checkpoint = Checkpoint(f"{folder}/weights.ckpt")
        ...     network = checkpoint.network(into=nn.Linear(2, 3))
        >>> list(checkpoint.state_dict), checkpoint.global_step, network.training
        (['weight', 'bias'], 0, False)
    """

    def __init__(self, path: str | Path, *, trusted: Collection[str] = ()) -> None:
        self.path = Path(path).expanduser()
        self.trusted = frozenset(trusted)
        self.content = read_checkpoint(path)
        check_format(self.content, path)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r})"

    @classmethod
    def of_run(cls, path: str | Path) -> "Checkpoint":
        """Open a checkpoint that a module of kd_lightning has saved.

        Raises:
            MissingFileError: If there is no such file.
            UserError: If the file cannot be opened, or contains only weights.
        """
        checkpoint = cls(path)
        if not checkpoint.is_run:
            raise UserError(
                f"{str(path)!r} is not a checkpoint of a run; to use the weights in it, fill a network with "
                "from_checkpoint."
            )
        return checkpoint

    @property
    def is_run(self) -> bool:
        """Return whether a module of kd_lightning has saved the file."""
        return KEY in self.content and isinstance(self.content.get("state_dict"), dict)

    @property
    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the weights and buffers of the module."""
        weights: Mapping[str, Tensor] = self.content.get("state_dict", {})
        return weights

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """Return the plain arguments of the module, which a run of the command line saves in full."""
        saved: dict[str, Any] = self.content.get("hyper_parameters", {})
        return saved

    @property
    def data_config(self) -> DataConfig:
        """Return the input statistics and classes of the network."""
        return DataConfig.of(**self.content.get("data_config", {}))

    @property
    def sliced_shapes(self) -> dict[str, list[int]] | None:
        """Return the shapes of the weights and buffers of a pruned network, or ``None``."""
        return self.content.get("sliced_shapes")

    @property
    def global_step(self) -> int:
        """Return the number of training steps."""
        return int(self.content.get("global_step", 0))

    @cached_property
    def sha256(self) -> str:
        """Return the hexadecimal digest of the file."""
        return sha256(self.path)

    def trust(self) -> None:
        """Import what the checkpoint names, and let it create that: its hyper-parameters become a program.

        Raises:
            UserError: If it names a class that does not exist.
        """
        for key in ("hyper_parameters", "datamodule_hyper_parameters"):
            self.trusted |= import_classes(self.content.get(key), str(self.path))

    def restore_data(self, data: object) -> None:
        """Give a data module the state that was saved of it, as which images are tested on, and the network's sizes."""
        state = self.content.get(type(data).__qualname__)
        if isinstance(state, dict) and isinstance(data, pl.LightningDataModule):
            data.load_state_dict(state)
        if hasattr(data, "follow_networks"):
            data.follow_networks({"the network": self.data_config})

    def __fspath__(self) -> str:
        return str(self.path)

    def network(self, into: nn.Module | None = None) -> nn.Module:
        """Return the network with its weights and ``data_config``, in eval mode.

        Args:
            into: A network of the saved architecture, which gets the weights; needed where the checkpoint does not
                describe how its network is built, because it was saved from Python.

        Raises:
            UserError: If the checkpoint names classes that are not trusted, or does not describe its network, or if
                its weights do not fit ``into``.
        """
        if into is not None:
            return from_checkpoint(into, self.path).eval()
        # the teacher is not rebuilt
        saved = {name: value for name, value in self.hyper_parameters.items() if name != "teacher"}
        check_trusted_classes(saved, str(self.path), trusted=self.trusted)
        kind = resolve(saved.get("_class_path"))
        if not (
            self.is_run
            and isinstance(kind, type)
            and issubclass(kind, pl.LightningModule)
            and hasattr(kind, "network_argument")
        ):
            raise UserError(
                f"{str(self.path)!r} does not describe how its network is built, as checkpoints of the command line "
                "do; build the network in Python and pass it, Checkpoint(path).network(into=network), for example to "
                "kd_lightning.export.export_network."
            )
        options = {"teacher": None} if "teacher" in self.hyper_parameters else {}
        rebuilt = kind.load_from_checkpoint(self, **options)  # type: ignore[arg-type]  # our modules accept it
        return rebuilt.get_submodule("network").eval()
