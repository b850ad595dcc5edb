"""The patterns of the folder's README run as they are printed; those of absent packages are left out."""

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_options import QUICK

import kd_lightning.runs

README = Path(kd_lightning.runs.__file__).with_name("README.md")
Command = Callable[..., str]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_they_are_short() -> None:
    assert len(blocks("python")) == 2
    for block in [*blocks("python"), *blocks("bash")]:
        lines = [line for line in block.splitlines() if line and not line.startswith(("import", "from"))]
        assert len(lines) <= 11


@pytest.fixture
def teacher(kd: Command) -> None:
    kd("fit", "-c", "digits/teacher", *QUICK)
    torch.set_num_threads(1)


def quick(block: str) -> str:
    """The block with few and short trials."""
    text = block.replace("max_epochs=20", 'max_epochs=1, accelerator="cpu", log_every_n_steps=5, teacher_check="off"')
    return text.replace("n_trials=30", "n_trials=2").replace("num_samples=8", "num_samples=2")


@pytest.mark.slow
@pytest.mark.usefixtures("teacher")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("package", ["optuna", "ray"])
def test_a_sweep_finds_its_best_run(
    package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # of Ray's processes
    [block] = [block for block in blocks("python") if package in block]
    exec(compile(quick(block), package, "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    assert "'alpha': 0." in printed
    assert Path(printed.split()[-1], "fit.json").is_file()
    assert not Path(printed.split()[-1], "test.json").exists(), "the test images are left alone"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb: Any = sys.modules.get("wandb")
    if wandb is not None:
        wandb.finish()


@pytest.mark.slow
@pytest.mark.usefixtures("teacher", "offline")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("package", "written"), [("wandb", "wandb/offline-run-*"), ("mlflow", "mlflow.db")])
def test_a_logger_by_flag_keeps_the_folder_of_the_run(kd: Command, package: str, written: str) -> None:
    pytest.importorskip(package)
    [block] = [block for block in blocks("bash") if f"{package.lower()}logger" in block.lower()]
    line = block.replace("\\\n", " ").splitlines()[0]
    printed = kd(*shlex.split(line)[1:], *QUICK)
    assert "Next: kd-lightning test -c lightning_logs/digits/distill/version_0" in printed
    assert list(Path("lightning_logs").glob(written))
    assert Path("lightning_logs/digits/distill/version_0/checkpoints/best.ckpt").is_file()
    assert "test/accuracy" in kd("test", "-c", "digits/distill", "--trainer.enable_progress_bar=false")
