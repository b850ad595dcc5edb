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


def test_the_summary_has_the_test_metrics(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    module = DistillationModule(small(), small(8), teacher_check="off")
    trainer = make_trainer(callbacks=[RunSummary(0.02)], logger=TensorBoardLogger(tmp_path, name="run"))
    metrics = trainer.test(module, digits, verbose=False)[0]
    summary = json.loads((tmp_path / "run" / "version_0" / "test.json").read_text())
    measured = {name.removeprefix("test/"): value for name, value in metrics.items()}
    assert set(measured) == {"accuracy", "top5", "ece", "loss", "agreement", "kl"}
    assert {name: summary[name] for name in measured} == pytest.approx(measured, abs=1e-6)
    assert summary["parameters"] == sum(weight.numel() for weight in module.student.parameters())
    assert summary["images_per_second"] > 0
    assert summary["device"] == "cpu"
    assert summary["checkpoint"] is None
    assert summary["file_bytes"] is None


def test_the_summary_names_the_checkpoint_and_its_size(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    module = TeacherModule(small())
    trainer = make_trainer(callbacks=[RunSummary(0.02)], logger=TensorBoardLogger(tmp_path), num_sanity_val_steps=0)
    trainer.fit(module, digits)
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    metrics = trainer.test(module, digits, ckpt_path=path, weights_only=True, verbose=False)[0]
    summary = json.loads((Path(str(trainer.log_dir)) / "test.json").read_text())
    assert summary["checkpoint"] == str(path)
    assert summary["file_bytes"] == path.stat().st_size
    assert summary["accuracy"] == pytest.approx(metrics["test/accuracy"], abs=1e-6)
    assert not any("/" in name or name == "train" for name in summary)


def test_measuring_speed_does_not_change_the_network(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    module = TeacherModule(small()).train()
    before = copy.deepcopy(module.state_dict())
    make_trainer(callbacks=[RunSummary(0.02)]).test(module, digits, verbose=False)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert (tmp_path / "test.json").is_file()  # in default_root_dir, since there is no logger


def test_a_second_test_overwrites_the_summary(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    trainer, module = make_trainer(callbacks=[RunSummary(0.0)]), TeacherModule(small())
    trainer.test(module, digits, verbose=False)
    with torch.no_grad():
        module.network.get_parameter("fc.weight").neg_()
    metrics = trainer.test(module, digits, verbose=False)[0]
    assert json.loads((tmp_path / "test.json").read_text())["loss"] == pytest.approx(metrics["test/loss"], abs=1e-6)


class FakeTrainer:
    """The attributes of a trainer that the summary reads; ``log_dir`` is a collective call, as Lightning documents."""

    ckpt_path = None

    def __init__(self, rank: int, folder: Path) -> None:
        self.is_global_zero = rank == 0
        self.callback_metrics = {"test/accuracy": torch.tensor(0.5), "train/loss": torch.tensor(1.0)}
        self.folder, self.collectives = folder, 0

    @property
    def log_dir(self) -> str:
        self.collectives += 1
        return str(self.folder)


def summarize_on_rank(rank: int, folder: Path) -> int:
    """Write the summary, and return the number of collective calls."""
    trainer: Any = FakeTrainer(rank, folder)
    callback, module = RunSummary(0.0), TeacherModule(nn.Flatten())
    callback.on_test_batch_start(trainer, module, (torch.rand(2, 3, 1, 1),), 0)
    callback.on_test_end(trainer, module)
    return trainer.collectives


def test_only_rank_0_writes(tmp_path: Path) -> None:
    summarize_on_rank(1, tmp_path)
    assert list(tmp_path.iterdir()) == []
    summarize_on_rank(0, tmp_path)
    summary = json.loads((tmp_path / "test.json").read_text())
    assert summary["accuracy"] == 0.5
    assert "loss" not in summary


def test_all_ranks_make_the_same_collective_calls(tmp_path: Path) -> None:
    assert summarize_on_rank(0, tmp_path) == summarize_on_rank(1, tmp_path)


@pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded|barrier|nn.parallel).*")
def test_two_processes_report_the_metrics_of_one(small: Networks, make_trainer: Trainers, tmp_path: Path) -> None:
    module, found = TeacherModule(small()), []
    for world in (1, 2):
        options: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2} if world == 2 else {}
        folder = tmp_path / str(world)
        trainer = make_trainer(callbacks=[RunSummary(0.0)], default_root_dir=folder, **options)
        trainer.test(module, DigitsDataModule(batch_size=77), verbose=False)
        summary = json.loads((folder / "test.json").read_text())
        summary.pop("images_per_second")
        found.append(summary)
    classes = [summary.pop("classes") for summary in found]
    assert classes[0] == classes[1]
    assert sum(one["images"] for one in classes[0].values()) == 360
    assert found[1] == pytest.approx(found[0], abs=2e-6)


class NetworkWithClock(nn.Module):
    """Advances its clock by half a second a batch, and by five seconds in each of the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.now = 0, 100.0

    def forward(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.calls += 1
        self.now += 5.0 if self.calls <= 2 else 0.5
        return images


@pytest.mark.parametrize(("seconds", "batches"), [(2.0, 4), (2.1, 5), (0.0, 1)])
def test_the_speed_is_measured_after_a_warm_up(monkeypatch: pytest.MonkeyPatch, seconds: float, batches: int) -> None:
    network = NetworkWithClock()
    monkeypatch.setattr(run_summary, "perf_counter", lambda: network.now)
    assert images_per_second(network, torch.rand(8, 1), seconds) == pytest.approx(8 / 0.5)
    assert network.calls == 2 + batches
