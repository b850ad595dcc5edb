"""Progress in lines, where the output is a file."""

import re
from collections.abc import Callable
from functools import wraps
from typing import Any

import lightning.pytorch as pl
import pytest
from command_options import QUICK

from kd_lightning import DigitsDataModule, TeacherModule
from kd_lightning.callbacks import LineProgress, line_progress
from kd_lightning.files import progress as files_progress
from kd_lightning.networks import ResNet

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which each look at it takes three seconds."""
    now = [0.0]

    def clock() -> float:
        now[0] += 3
        return now[0]

    monkeypatch.setattr(line_progress, "monotonic", clock)
    monkeypatch.setattr(files_progress, "monotonic", clock)


def lines(capsys: Capture, title: str) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith(title)]


@pytest.mark.usefixtures("slow")
def test_a_training_prints_a_line_every_ten_per_cent(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, capsys: Capture
) -> None:
    trainer = make_trainer(callbacks=[LineProgress()], enable_progress_bar=True, max_epochs=4)
    trainer.fit(TeacherModule(small()), digits)  # five batches an epoch
    printed = lines(capsys, "Training:")
    assert [int(line.split()[1]) for line in printed] == list(range(10, 100, 10))
    assert re.fullmatch(r"Training: 10 %, epoch 1 of 4, \d+ s left", printed[0])
    assert re.fullmatch(r"Training: 90 %, epoch 4 of 4, \d s left, val/accuracy 0\.\d{4}", printed[-1])


@pytest.mark.usefixtures("slow")
def test_an_evaluation_prints_lines_and_the_validation_of_a_training_none(
    small: Networks, make_trainer: Trainers, capsys: Capture
) -> None:
    data, module = DigitsDataModule(batch_size=32), TeacherModule(small())
    trainer = make_trainer(callbacks=[LineProgress()], enable_progress_bar=True)
    trainer.fit(module, data)
    assert not lines(capsys, "Validating")
    for name, run in (("Testing", trainer.test), ("Validating", trainer.validate), ("Predicting", trainer.predict)):
        run(module, datamodule=data)
        assert lines(capsys, name)[0].startswith(f"{name}: 10 % of ")


def test_a_short_training_prints_nothing(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, capsys: Capture
) -> None:
    make_trainer(callbacks=[LineProgress()], enable_progress_bar=True).fit(TeacherModule(small()), digits)
    assert not lines(capsys, "Training:")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--trainer.enable_progress_bar=true"], "LineProgress"),
        (["--trainer.enable_progress_bar=false"], None),
        (["--trainer.enable_progress_bar=true", "--trainer.callbacks+=TQDMProgressBar"], "TQDMProgressBar"),
    ],
)
def test_the_command_prints_lines_into_a_file(
    kd: Callable[..., str], monkeypatch: pytest.MonkeyPatch, options: list[str], expected: str | None
) -> None:
    seen: list[Any] = []
    fit = pl.Trainer.fit

    @wraps(fit)  # whose arguments are the command's options
    def record(trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        seen.append(trainer.progress_bar_callback)
        fit(trainer, *args, **kwargs)

    monkeypatch.setattr(pl.Trainer, "fit", record)
    kd("fit", "-c", "digits/student", *QUICK, *options)
    assert [None if bar is None else type(bar).__name__ for bar in seen] == [expected]
