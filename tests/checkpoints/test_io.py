"""Checkpoints of Lightning's Trainer are written atomically, and loaded without running code."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from kd_lightning import DigitsDataModule, TeacherModule
from kd_lightning.checkpoints.checkpoint import Checkpoint
from kd_lightning.checkpoints.io import AtomicCheckpointIO, use_atomic_checkpoints
from kd_lightning.networks import ResNet

Trainers = Callable[..., pl.Trainer]


def small_module() -> TeacherModule:
    torch.manual_seed(1)
    return TeacherModule(ResNet([1], [4], in_channels=1))


def data() -> DigitsDataModule:
    return DigitsDataModule(batch_size=512)


class Payload:
    """An object whose unpickling creates a folder."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


@pytest.fixture
def saved(make_trainer: Trainers, tmp_path: Path) -> Path:
    trainer = make_trainer()
    trainer.fit(small_module(), data())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    return tmp_path / "saved.ckpt"


def run_from_checkpoint(trainer: pl.Trainer, command: str, path: Any, **options: Any) -> Any:
    return getattr(trainer, command)(small_module(), datamodule=data(), ckpt_path=path, **options)


def test_the_trainer_writes_checkpoints_atomically(
    make_trainer: Trainers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, list[str]]] = []
    save = torch.save

    def partial_save(content: Any, file: Any) -> None:
        written.append((Path(file.name).name, sorted(path.name for path in tmp_path.glob("*.ckpt"))))
        save(content, file)

    monkeypatch.setattr(torch, "save", partial_save)
    saves = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=1, save_last=True, monitor="epoch", mode="max")

    class Epoch(pl.Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            pl_module.log("epoch", float(trainer.current_epoch))

    make_trainer(max_epochs=2, callbacks=[Epoch(), saves], enable_checkpointing=True).fit(small_module(), data())
    assert written == [
        (f"epoch=0.ckpt.{os.getpid()}.tmp", []),
        (f"last.ckpt.{os.getpid()}.tmp", ["epoch=0.ckpt"]),
        (f"epoch=1.ckpt.{os.getpid()}.tmp", ["epoch=0.ckpt", "last.ckpt"]),
        (f"last.ckpt.{os.getpid()}.tmp", ["epoch=1.ckpt", "last.ckpt"]),
    ]
    assert sorted(path.name for path in tmp_path.glob("*")) == ["epoch=1.ckpt", "last.ckpt"]


def test_a_failed_save_keeps_the_previous_checkpoint(
    saved: Path, make_trainer: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()
    trainer = make_trainer()
    trainer.fit(small_module(), data())

    def partial_save(content: Any, file: Any) -> None:
        file.write(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", partial_save)
    with pytest.raises(OSError, match=r"saved\.ckpt' cannot be written \(No space left on device\)"):
        trainer.save_checkpoint(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved.ckpt"]


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("options", [{}, {"weights_only": False}])
def test_code_in_a_checkpoint_is_refused_and_not_run(
    command: str, options: dict[str, Any], saved: Path, make_trainer: Trainers
) -> None:
    content = torch.load(saved, weights_only=True)
    torch.save({**content, "more": Payload(saved.parent / "was run")}, saved)
    with pytest.raises(ValueError, match="contains code, which was not run"):
        run_from_checkpoint(make_trainer(), command, saved, **options)
    assert not (saved.parent / "was run").exists()


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_flipped_bit_is_refused(command: str, saved: Path, make_trainer: Trainers) -> None:
    content = bytearray(saved.read_bytes())
    weight = torch.load(saved, weights_only=True)["state_dict"]["network.fc.weight"].numpy().tobytes()
    content[content.index(weight)] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read as a checkpoint .* does not match its checksum"):
        run_from_checkpoint(make_trainer(), command, saved)


def test_a_missing_checkpoint_is_refused(make_trainer: Trainers, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        run_from_checkpoint(make_trainer(), "fit", tmp_path / "none.ckpt")


def test_remote_paths_use_lightnings_checkpoint_io(make_trainer: Trainers, saved: Path) -> None:
    address = "memory://runs/one.ckpt"
    trainer = make_trainer()
    trainer.fit(small_module(), data())
    trainer.save_checkpoint(address)
    assert fsspec.filesystem("memory").exists(address)
    again = make_trainer(max_epochs=2)
    run_from_checkpoint(again, "fit", address)
    assert again.current_epoch == 2
    with fsspec.open(address, "wb") as file:
        torch.save({**torch.load(saved, weights_only=True), "more": Payload(saved.parent / "was run")}, file)
    with pytest.raises(Exception, match=r"Weights only load failed"):
        run_from_checkpoint(make_trainer(max_epochs=2), "fit", address, weights_only=False)
    assert not (saved.parent / "was run").exists()
    trainer.strategy.checkpoint_io.remove_checkpoint(address)
    assert not fsspec.filesystem("memory").exists(address)


@pytest.mark.parametrize("name", ["a.ckpt", "loss[1]*.ckpt"])
def test_temporary_files_of_killed_saves_are_removed(name: str, tmp_path: Path) -> None:
    for left in (f"{name}.17.tmp", f"{name}.18.tmp", "b.ckpt.17.tmp", name):
        (tmp_path / left).touch()
    content = {"state_dict": {"a": torch.ones(1)}, "kd_lightning_format": 1}
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "b.ckpt.17.tmp"])
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / name) == content


def test_only_checkpoints_beside_written_ones_are_removed(tmp_path: Path) -> None:
    """A checkpoint in a folder to which nothing was written is kept."""
    files, other = AtomicCheckpointIO(), tmp_path / "elsewhere" / "file.ckpt"
    other.parent.mkdir()
    other.touch()
    files.save_checkpoint({"a": torch.ones(1)}, tmp_path / "file.ckpt")
    for path in (tmp_path / "file.ckpt", other):
        files.remove_checkpoint(path)
    assert list(tmp_path.rglob("*.ckpt")) == [other]


class UserCheckpointIO(TorchCheckpointIO):
    pass


@pytest.mark.filterwarnings("ignore:.*AsyncCheckpointIO.*")
@pytest.mark.parametrize("build", [UserCheckpointIO, lambda: AsyncCheckpointIO(UserCheckpointIO())])
def test_a_checkpoint_io_given_by_the_user_is_kept(build: Callable[[], CheckpointIO], make_trainer: Trainers) -> None:
    given = build()
    trainer = make_trainer(plugins=[given])
    trainer.fit(small_module(), data())
    assert trainer.strategy.checkpoint_io is given


def test_a_strategy_without_a_settable_checkpoint_io_is_not_changed() -> None:
    class Sharded:
        checkpoint_io = property(lambda self: UserCheckpointIO())  # none can be set

    use_atomic_checkpoints(Sharded())  # type: ignore[arg-type]


def test_the_atomic_checkpoint_io_is_set_once() -> None:
    strategy: Any = SimpleNamespace(checkpoint_io=TorchCheckpointIO())
    use_atomic_checkpoints(strategy)
    first = strategy.checkpoint_io
    use_atomic_checkpoints(strategy)
    assert isinstance(first, AtomicCheckpointIO)
    assert strategy.checkpoint_io is first


def test_an_opened_checkpoint_is_not_read_again_but_for_its_own_path_and_once(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.ckpt"
    shutil.copy(saved, other)
    opened = Checkpoint(saved)
    files = AtomicCheckpointIO(opened)
    assert files.load_checkpoint(str(other)) is not opened.content
    assert files.load_checkpoint(str(saved)) is opened.content
    assert files.load_checkpoint(str(saved)) is not opened.content  # which Lightning may have changed
