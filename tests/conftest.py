# torch is imported by the fixtures: nothing may look for GPUs before pytest_configure has decided who sees them
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from gpu_selection import selects_gpu_tests

collect_ignore = ["other_device.py"]  # to import it for doctests would register the device here

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from browser import Browser

    from kd_lightning import DigitsDataModule
    from kd_lightning.networks import ResNet


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs from this process and its children, unless GPU tests were asked for.

    Tests of several processes fork, which CUDA does not survive.
    """
    if selects_gpu_tests(config.option.markexpr):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic runs, before CUDA begins
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell does for a run in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # for networks this small, threads cost more than they save, in children too; and once there are any, none can fork
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests where there is no GPU."""
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    torch.manual_seed(0)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # of a command in another test: forked ranks would seed again


@pytest.fixture
def small() -> "Callable[..., ResNet]":
    """A network for the digits in which an epoch takes a tenth of a second."""
    from kd_lightning.networks import ResNet

    def build(width: int = 4, num_classes: int = 10) -> "ResNet":
        return ResNet([1, 1], [width, 2 * width], num_classes, in_channels=1)

    return build


@pytest.fixture
def digits() -> "DigitsDataModule":
    from kd_lightning import DigitsDataModule

    return DigitsDataModule(batch_size=256)


@pytest.fixture
def make_trainer(tmp_path: Path) -> "Callable[..., pl.Trainer]":
    """A quiet trainer on the CPU."""
    import lightning.pytorch as pl

    def build(**options: Any) -> "pl.Trainer":
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
    monkeypatch.setattr("sys.path", [*sys.path])  # the command adds the working folder

    def call(*arguments: str) -> str:
        from kd_lightning.__main__ import main

        monkeypatch.setattr("sys.argv", ["kd-lightning", *arguments])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def here(kd: Callable[..., str], trained: Path, tmp_path: Path) -> Path:
    """The working folder, with a copy of the runs in the folder that the test file's fixture ``trained`` gives."""
    shutil.copytree(trained / "lightning_logs", tmp_path / "lightning_logs")
    return tmp_path


@pytest.fixture
def loaded_files(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that ``torch.load`` has read so far."""
    import torch

    files: list[Path] = []
    load = torch.load

    def recorded(file: str | Path, **options: Any) -> Any:
        files.append(Path(file))
        return load(file, **options)

    monkeypatch.setattr(torch, "load", recorded)
    return files


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Browser]":
    """A browser without a window, of all tests that look at a page."""
    from browser import Browser, require_browser

    require_browser()
    started = Browser(tmp_path_factory.mktemp("browser"))
    yield started
    started.close()


@pytest.fixture
def beside_the_scripts() -> Iterator[None]:
    """Scripts can be imported; they silence Lightning, here only for a while."""
    scripts = str(Path(__file__).parents[1] / "scripts")
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    sys.path.insert(0, scripts)
    yield
    sys.path.remove(scripts)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def no_group_is_left() -> Iterator[None]:
    """Fails where a process group outlives its test."""
    import torch.distributed as dist

    assert not dist.is_initialized()
    yield
    assert not dist.is_initialized()
