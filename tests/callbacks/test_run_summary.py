import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from kd_lightning import DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.callbacks import RunSummary, run_summary
from kd_lightning.callbacks.run_summary import images_per_second

Networks = Callable[..., nn.Module]
Trainers = Callable[..., pl.Trainer]


def test_figures_are_those_of_the_test(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    module = DistillationModule(small(), small(8), teacher_check="off")
    trainer = make_trainer(callbacks=[RunSummary(0.02)], logger=TensorBoardLogger(tmp_path, name="run"))
    figures = trainer.test(module, digits, verbose=False)[0]
    report = json.loads((tmp_path / "run" / "version_0" / "test.json").read_text())
    measured = {name.removeprefix("test/"): value for name, value in figures.items()}
    assert set(measured) == {"accuracy", "top5", "ece", "loss", "agreement", "kl"}
    assert {name: report[name] for name in measured} == pytest.approx(measured, abs=1e-6)
    assert report["parameters"] == sum(weight.numel() for weight in module.student.parameters())
    assert report["images_per_second"] > 0
    assert report["device"] == "cpu"
    assert report["checkpoint"] is None
    assert report["file_bytes"] is None


def test_a_tested_checkpoint_is_named_and_measured(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    module = TeacherModule(small())
    trainer = make_trainer(callbacks=[RunSummary(0.02)], logger=TensorBoardLogger(tmp_path), num_sanity_val_steps=0)
    trainer.fit(module, digits)
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    figures = trainer.test(module, digits, ckpt_path=path, weights_only=True, verbose=False)[0]
    report = json.loads((Path(str(trainer.log_dir)) / "test.json").read_text())
    assert report["checkpoint"] == str(path)
    assert report["file_bytes"] == path.stat().st_size
    assert report["accuracy"] == pytest.approx(figures["test/accuracy"], abs=1e-6)
    assert not any("/" in name or name == "train" for name in report)


def test_measuring_moves_no_weight_and_no_statistic(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    module = TeacherModule(small()).train()
    before = copy.deepcopy(module.state_dict())
    make_trainer(callbacks=[RunSummary(0.02)]).test(module, digits, verbose=False)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert (tmp_path / "test.json").is_file()  # without a logger in the root


def test_a_second_test_replaces_the_first(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    trainer, module = make_trainer(callbacks=[RunSummary(0.0)]), TeacherModule(small())
    trainer.test(module, digits, verbose=False)
    with torch.no_grad():
        module.network.get_parameter("fc.weight").neg_()
    figures = trainer.test(module, digits, verbose=False)[0]
    assert json.loads((tmp_path / "test.json").read_text())["loss"] == pytest.approx(figures["test/loss"], abs=1e-6)


class Rank:
    """As much of a trainer as the report looks at; ``log_dir`` is a collective call, as Lightning documents."""

    ckpt_path = None

    def __init__(self, rank: int, folder: Path) -> None:
        self.is_global_zero = rank == 0
        self.callback_metrics = {"test/accuracy": torch.tensor(0.5), "train/loss": torch.tensor(1.0)}
        self.folder, self.collectives = folder, 0

    @property
    def log_dir(self) -> str:
        self.collectives += 1
        return str(self.folder)


def run_rank(rank: int, folder: Path) -> Rank:
    trainer: Any = Rank(rank, folder)
    summary, module = RunSummary(0.0), TeacherModule(nn.Flatten())
    summary.on_test_batch_start(trainer, module, (torch.rand(2, 3, 1, 1),), 0)
    summary.on_test_end(trainer, module)
    return trainer


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    run_rank(1, tmp_path)
    assert list(tmp_path.iterdir()) == []
    run_rank(0, tmp_path)
    report = json.loads((tmp_path / "test.json").read_text())
    assert report["accuracy"] == 0.5
    assert "loss" not in report


def test_all_ranks_take_part_in_collectives(tmp_path: Path) -> None:
    assert run_rank(0, tmp_path).collectives == run_rank(1, tmp_path).collectives


@pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded|barrier|nn.parallel).*")
def test_two_processes_report_the_figures_of_one(small: Networks, make_trainer: Trainers, tmp_path: Path) -> None:
    module, found = TeacherModule(small()), []
    for world in (1, 2):
        options: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2} if world == 2 else {}
        folder = tmp_path / str(world)
        trainer = make_trainer(callbacks=[RunSummary(0.0)], default_root_dir=folder, **options)
        trainer.test(module, DigitsDataModule(batch_size=77), verbose=False)
        report = json.loads((folder / "test.json").read_text())
        report.pop("images_per_second")
        found.append(report)
    assert found[1] == pytest.approx(found[0], abs=2e-6)


class Clocked(nn.Module):
    """Takes half a second for a batch, and the first two ten times that, on a clock of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.now = 0, 100.0

    def forward(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.calls += 1
        self.now += 5.0 if self.calls <= 2 else 0.5
        return images


@pytest.mark.parametrize(("seconds", "batches"), [(2.0, 4), (2.1, 5), (0.0, 1)])
def test_the_speed_leaves_the_warm_up_out(monkeypatch: pytest.MonkeyPatch, seconds: float, batches: int) -> None:
    network = Clocked()
    monkeypatch.setattr(run_summary, "perf_counter", lambda: network.now)
    assert images_per_second(network, torch.rand(8, 1), seconds) == pytest.approx(8 / 0.5)
    assert network.calls == 2 + batches
