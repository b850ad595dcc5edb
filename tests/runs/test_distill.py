"""Distillation in one call: what the command does, from Python."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.demos.boring_classes import BoringDataModule
from torch.utils.data import TensorDataset

from kd_lightning import Checkpoint, DatasetDataModule, DigitsDataModule, Run, distill
from kd_lightning.callbacks import RunSummary
from kd_lightning.networks import ResNet

Networks = Callable[..., ResNet]

EXAMPLE = Path(__file__).parents[2] / "scripts/example.py"
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
    "max_epochs": 1,
    "teacher_check": "off",
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def quick(small: Networks, digits: DigitsDataModule) -> Run:
    return distill(small(), small(8), digits, **QUIET)


def test_it_trains_tests_and_returns_the_run(small: Networks, digits: DigitsDataModule) -> None:
    student = small()
    before = student.fc.weight.clone()
    run = distill(student, small(8), digits, name="mine", temperature=2.0, **QUIET)
    assert run.folder == Path("lightning_logs/mine/version_0")
    assert not torch.equal(before, student.fc.weight.cpu())
    assert run.test is not None
    assert run.fit is not None
    assert {"accuracy", "agreement", "parameters"} <= set(run.test)
    assert (run.fit["epochs"], run.fit["finished"]) == (1, True)
    assert run.fit["cost"]["teacher"] > 0
    assert Run.find("mine").folder == run.folder
    assert list(run.folder.glob("events.out.tfevents.*"))
    assert run.last.hyper_parameters["temperature"] == 2.0


def test_the_best_network_is_filled_into_another(quick: Run, small: Networks) -> None:
    network = quick.best.network(into=small())
    assert not network.training
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, quick.best.state_dict[f"network.{name}"])


def test_without_a_network_the_error_says_what_to_pass(quick: Run, small: Networks) -> None:
    with pytest.raises(ValueError, match=r"does not describe how its network is built.*network\(into=network\)"):
        quick.best.network()
    with pytest.raises(ValueError, match=r"does not fit ResNet"):
        quick.best.network(into=small(16))


def test_a_run_teaches_by_its_name_its_object_and_its_checkpoint(
    small: Networks, digits: DigitsDataModule, kd: Callable[..., str]
) -> None:
    options = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    kd("fit", "-c", "digits/student", *options)
    teacher = Run.find("digits/student")
    for named in ("digits/student", teacher, teacher.best):
        run = distill(small(), named, digits, **QUIET)
        assert run.fit is not None
        [file] = run.fit["teachers"]
        assert Path(file["path"]) == teacher.best_file
        assert file["sha256"] == teacher.best.sha256


def test_an_interrupted_run_is_resumed_in_its_folder(small: Networks, digits: DigitsDataModule) -> None:
    first = distill(small(), small(8), digits, **QUIET)
    resumed = distill(small(), small(8), digits, ckpt_path=first.last_file, **{**QUIET, "max_epochs": 3})
    assert resumed.folder.absolute() == first.folder.absolute()
    assert resumed.fit is not None
    assert resumed.fit["epochs"] == 3
    assert [run.name for run in Path("lightning_logs/distill").iterdir()] == ["version_0"]


def test_callbacks_of_the_user_are_added(small: Networks, digits: DigitsDataModule) -> None:
    stop = EarlyStopping("val/accuracy", mode="max")
    run = distill(small(), small(8), digits, callbacks=[stop, RunSummary(seconds=0.1)], **QUIET)
    assert stop.best_score > 0
    assert run.test is not None


def test_data_without_test_images_are_not_tested(small: Networks) -> None:
    images, labels = torch.rand(64, 1, 8, 8), torch.arange(64) % 10
    data = DatasetDataModule(TensorDataset(images, labels), num_classes=10, mean=[0.5], std=[0.5], batch_size=16)
    run = distill(small(), small(8), data, **QUIET)
    assert run.test is None
    assert run.best_file.is_file()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_epoch": 3}, r"'max_epoch' is an option of neither .* nor Trainer; the nearest is max_epochs"),
        ({"temprature": 3}, "the nearest is temperature"),
        ({"enable_checkpointing": False}, "distill returns a run with its best checkpoint"),
        ({"alpha": 3.0}, r"alpha, the weight of the teacher's term, must be in \[0, 1\]"),
    ],
)
def test_options_are_used_or_refused(
    small: Networks, digits: DigitsDataModule, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        distill(small(), small(8), digits, **options)
    assert not Path("lightning_logs").exists()


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [("nobody", "There is no checkpoint, run or trained recipe 'nobody'"), (3, "must be a network, a run or a check")],
)
def test_a_teacher_that_is_none_is_refused(
    small: Networks, digits: DigitsDataModule, teacher: Any, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        distill(small(), teacher, digits, **QUIET)


def test_loaders_are_refused_with_advice(small: Networks) -> None:
    with pytest.raises(ValueError, match=r"data must be a LightningDataModule, got list; wrap data sets in"):
        distill(small(), small(8), [1, 2], **QUIET)  # type: ignore[arg-type]


def test_a_checkpoint_is_a_path(quick: Run) -> None:
    assert Path(quick.best) == quick.best_file
    assert Checkpoint(quick.best_file).sha256 == quick.best.sha256


def test_modules_of_others_need_no_test_loader(small: Networks) -> None:
    from kd_lightning.runs.distill import _has_test

    assert _has_test(BoringDataModule())
    assert not _has_test(pl.LightningDataModule())


@pytest.mark.filterwarnings("ignore:.*logging interval.*", "ignore:.*isn't allocating|.*num_workers.*")
def test_the_example_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    text, cells = EXAMPLE.read_text(), EXAMPLE.read_text().split("\n# %% ")
    assert len(cells) > 4
    assert all(cell[0].isupper() for cell in cells[1:]), "each cell begins with a sentence"
    quick, count = re.subn(r'"max_epochs": \d+', '"max_epochs": 2, "enable_progress_bar": False', text)
    assert count == 1
    exec(compile(quick, str(EXAMPLE), "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert re.search(r"val \d+\.\d%, test \d+\.\d%, 1,\d{3} parameters", printed)
    assert "lightning_logs/smaller/version_0: test" in printed
