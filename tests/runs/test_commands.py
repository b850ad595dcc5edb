import sys
from pathlib import Path

from kd_lightning import Run
from kd_lightning.runs.commands import commands_left, process_words

FIT = ["fit", "-c", "digits/student"]


def test_a_run_is_trained_then_resumed_then_complete(tmp_path: Path) -> None:
    run, config = Run(tmp_path), str(tmp_path / "config.yaml")
    test = ["test", "-c", config]
    assert commands_left(run, FIT) == [FIT, test]
    assert commands_left(run, FIT, test=False) == [FIT]
    run.config_file.touch()
    resumed = ["fit", "-c", config, "--ckpt_path=auto"]
    assert commands_left(run, FIT) == [resumed, test]
    assert commands_left(run, FIT, test=False) == [resumed]
    run.test_file.touch()
    assert commands_left(run, FIT) == []


def test_a_command_runs_with_this_python() -> None:
    assert process_words(FIT) == [sys.executable, "-m", "kd_lightning", *FIT]
