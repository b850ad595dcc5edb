"""Runs that a logger of the user's writes elsewhere: found by the same flags, by their folder, or it is said where."""

from collections.abc import Callable
from pathlib import Path

import pytest
from command_options import QUICK, QUIET
from jsonargparse import Namespace
from mostly_slow import mostly_slow

from kd_lightning.cli import loggers

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


@pytest.mark.parametrize("kind", mostly_slow(LOGGERS, "name", "csv", "none"))
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


@pytest.mark.parametrize("flag", ["--trainer.logger=", "--trainer.logger+="])
@pytest.mark.parametrize(
    ("logger", "package"), [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow"), ("CometLogger", "comet-ml")]
)
def test_a_logger_whose_package_is_missing_says_what_to_install(
    kd: Command, monkeypatch: pytest.MonkeyPatch, flag: str, logger: str, package: str
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        kd("fit", "-c", "digits/student", f"{flag}{logger}", *SHORT)
    assert ended.value.code == (
        f"kd-lightning fit: {logger} needs the package {package}, which is not installed; run `pip install {package}`, "
        "or choose another logger."
    )
    assert not Path("lightning_logs").exists()


def _logger(name: str, **arguments: object) -> Namespace:
    return Namespace(class_path=f"lightning.pytorch.loggers.{name}", init_args=Namespace(**arguments))


@pytest.mark.parametrize("given", ["WandbLogger", "MLFlowLogger"])
def test_a_logger_without_a_folder_gets_one_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options = Namespace(trainer=Namespace(logger=_logger(given, save_dir=".", tracking_uri=None)))
    said = list(loggers.keep_run_folder(options, ["fit", "--trainer.logger.init_args.name=digits/student"]))
    assert said[-1] == f"A TensorBoardLogger writes the folder of the run beside {given}."
    first, second = options.trainer.logger
    assert first.class_path.endswith("TensorBoardLogger")
    assert (first.init_args.save_dir, first.init_args.name) == ("lightning_logs", "digits/student")
    assert second.class_path.endswith(given)
    assert (second.init_args.tracking_uri == "sqlite:///lightning_logs/mlflow.db") == (given == "MLFlowLogger")


@pytest.mark.parametrize("given", ["CSVLogger", "TensorBoardLogger"])
def test_loggers_with_a_folder_stay_alone(given: str) -> None:
    options = Namespace(trainer=Namespace(logger=[_logger(given), _logger("WandbLogger")]))
    assert list(loggers.keep_run_folder(options, [])) == []
    assert len(options.trainer.logger) == 2
    assert list(loggers.keep_run_folder(Namespace(trainer=Namespace(logger=False)), [])) == []


def test_a_logger_that_cannot_be_built_is_named() -> None:
    options = Namespace(trainer=Namespace(logger=[_logger("CSVLogger", save_dir="x", nothing=3)]))
    assert "CSVLogger cannot be built: " in str(loggers.explain_logger_error(options))
    assert (
        loggers.explain_logger_error(Namespace(trainer=Namespace(logger=[_logger("CSVLogger", save_dir="x")]))) is None
    )
