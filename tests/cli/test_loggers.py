"""Runs that a logger of the user's writes elsewhere: found by the same flags, by their folder, or it is said where."""

from collections.abc import Callable
from pathlib import Path

import pytest
from command_options import QUICK, QUIET

Command = Callable[..., str]

SHORT = [*QUICK, "--trainer.max_epochs=1", "--model.network.widths=[3,5,7]"]
LOGGERS: dict[str, tuple[list[str], str]] = {
    "csv": (
        ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=elsewhere"],
        "elsewhere/digits/student/version_0",
    ),
    "root": (["--trainer.default_root_dir=rooted"], "rooted/lightning_logs/digits/student/version_0"),
    "name": (["--trainer.logger.name=other", "--trainer.logger.version=mine"], "lightning_logs/other/mine"),
    "number": (["--trainer.logger.init_args.version=3"], "lightning_logs/digits/student/version_3"),
    "list": (["--trainer.logger=[CSVLogger]"], "lightning_logs/digits/student/version_0"),
    "none": (["--trainer.logger=false"], "."),
}


@pytest.mark.parametrize("kind", LOGGERS)
def test_a_run_is_found_by_its_flags_and_by_its_folder(kd: Command, kind: str) -> None:
    flags, folder = LOGGERS[kind]
    kd("fit", "-c", "digits/student", *flags, *SHORT)
    assert "test/accuracy" in kd("test", "-c", "digits/student", *flags, *QUIET)
    assert folder in kd("compare", folder), "the results of the test are written beside the run"
    kd("fit", "-c", folder, "--ckpt_path=last", "--trainer.max_epochs=2", *QUIET)
    assert {file.parent for file in Path().rglob("*.ckpt")} == {Path(folder, "checkpoints")}
    if kind in ("csv", "list"):
        assert "train/loss" in Path(folder, "metrics_0.csv").read_text(), "which CSVLogger alone would have deleted"


def test_where_no_run_is_found_the_command_says_where_it_looked(kd: Command) -> None:
    kd("fit", "-c", "digits/student", *LOGGERS["name"][0], *SHORT)
    kd("fit", "-c", "digits/student", *LOGGERS["csv"][0], *SHORT)
    looked = "is not in lightning_logs/digits/student"
    with pytest.raises(SystemExit, match=looked):
        kd("export", "digits/student")
    with pytest.raises(SystemExit, match="'lightning_logs/digits/student' does not contain a run with checkpoints"):
        kd("test", "-c", "digits/student", *QUIET)
    with pytest.raises(SystemExit, match="or name lightning_logs/other/mine"):
        kd("export", "lightning_logs/other")
