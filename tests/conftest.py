from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from kd_lightning import DigitsDataModule
from kd_lightning.networks import ResNet

torch.set_num_threads(1)  # for networks this small, threads cost more than they save


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # of a command in another test: forked ranks would seed again


@pytest.fixture
def small() -> Callable[..., ResNet]:
    """A network for the digits in which an epoch takes a tenth of a second."""

    def build(width: int = 4, num_classes: int = 10) -> ResNet:
        return ResNet([1, 1], [width, 2 * width], num_classes, in_channels=1)

    return build


@pytest.fixture
def digits() -> DigitsDataModule:
    return DigitsDataModule(batch_size=256)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """A quiet trainer on the CPU."""

    def build(**options: Any) -> pl.Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "default_root_dir": tmp_path,
        }
        return pl.Trainer(**{**defaults, **options})

    return build


@pytest.fixture
def kd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a `kd-lightning` command in an empty folder and gives what it printed; its exit is a ``SystemExit``."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        from kd_lightning.__main__ import main

        monkeypatch.setattr("sys.argv", ["kd-lightning", *arguments])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return call
