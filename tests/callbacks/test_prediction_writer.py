import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DigitsDataModule, TeacherModule
from kd_lightning.callbacks import PredictionWriter

Networks = Callable[..., nn.Module]
Trainers = Callable[..., pl.Trainer]


def read(path: Path) -> list[tuple[str, str, float]]:
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image", "label", "probability"]
    return [(image, label, float(probability)) for image, label, probability in rows]


def predict_directly(network: nn.Module, data: DigitsDataModule) -> tuple[list[int], Tensor]:
    """Return labels and probabilities of the test images, computed without a trainer."""
    data.setup("predict")
    images = torch.cat([data.augment(stored).images for stored in data.predict_dataloader()])
    with torch.no_grad():
        logits = network.eval()(images)
    return logits.argmax(1).tolist(), logits.double().softmax(1).amax(1)


def test_each_image_has_a_row(small: Networks, make_trainer: Trainers, tmp_path: Path) -> None:
    network, writer = small(), PredictionWriter(str(tmp_path / "deep" / "er" / "p.csv"))
    make_trainer(callbacks=[writer]).predict(TeacherModule(network), DigitsDataModule(batch_size=77))
    labels, probabilities = predict_directly(network, DigitsDataModule(batch_size=77))
    assert writer.written == tmp_path / "deep" / "er" / "p.csv"
    rows = read(writer.written)
    assert len(rows) == 360
    assert [image for image, _, _ in rows] == [str(i) for i in range(360)]
    assert [int(label) for _, label, _ in rows] == labels
    assert [probability for _, _, probability in rows] == pytest.approx(probabilities.tolist(), abs=2e-6)


def test_an_existing_file_is_refused_before_the_first_batch(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    class FailOnFirstBatch(pl.Callback):
        def on_predict_batch_start(self, *args: Any) -> None:
            raise AssertionError

    path = tmp_path / "p.csv"
    path.write_text("mine")
    trainer = make_trainer(callbacks=[PredictionWriter(str(path)), FailOnFirstBatch()])
    with pytest.raises(FileExistsError, match=r"p\.csv' exists; name another file for the predictions\.$"):
        trainer.predict(TeacherModule(small()), digits)
    assert path.read_text() == "mine"


def test_the_default_file_is_in_the_log_folder_and_never_overwritten(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    writer, logger = PredictionWriter(), TensorBoardLogger(tmp_path, name="run")
    trainer, module, written = make_trainer(callbacks=[writer], logger=logger), TeacherModule(small()), []
    for _ in range(3):
        trainer.predict(module, digits)
        assert writer.written is not None
        written.append(writer.written)
    run = tmp_path / "run" / "version_0"
    assert written == [run / "predictions.csv", run / "predictions-1.csv", run / "predictions-2.csv"]
    assert read(written[0]) == read(written[1]) == read(written[2])


def test_without_a_logger_the_file_is_in_default_root_dir(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    writer = PredictionWriter()
    make_trainer(callbacks=[writer]).predict(TeacherModule(small()), digits)
    assert writer.written == tmp_path / "predictions.csv"


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_images_of_a_plain_loader_are_numbered(small: Networks, make_trainer: Trainers) -> None:
    images, writer, network = torch.rand(7, 1, 8, 8), PredictionWriter(), small()
    loader = DataLoader(TensorDataset(images, torch.zeros(7, dtype=torch.long)), batch_size=3)
    make_trainer(callbacks=[writer]).predict(TeacherModule(network), loader)
    assert writer.written is not None
    labels = network.eval()(images).argmax(1).tolist()
    assert [row[:2] for row in read(writer.written)] == [(str(i), str(label)) for i, label in enumerate(labels)]


class NamedImages:
    classes = ("cat", "dog, small")
    left_out = ("6 is broken",)

    def image_name(self, split: str, sample: int) -> str:
        return f"{split}/{sample}.png"


class FakeTrainer:
    """The attributes of a trainer that the writer reads; ``log_dir`` is a collective call, as Lightning documents."""

    world_size = 2
    datamodule = NamedImages()

    def __init__(self, rank: int, folder: Path) -> None:
        self.is_global_zero = rank == 0
        self.default_root_dir = str(folder)
        self.predict_dataloaders = [SimpleNamespace(left_out=[f"{name} is broken" for name in (8 - rank, 9)])]
        self.collectives = 0

    @property
    def log_dir(self) -> str:
        self.collectives += 1
        return self.default_root_dir


def run_ranks(monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[list[PredictionWriter], list[FakeTrainer]]:
    outputs_of_ranks = [
        [(torch.tensor([0, 2]), torch.tensor([0, 1]), torch.tensor([0.5, 0.75]))],
        [(torch.tensor([1, 3]), torch.tensor([1, 0]), torch.tensor([0.625, 1.0]))],
    ]
    writers, trainers = [PredictionWriter(), PredictionWriter()], [FakeTrainer(0, folder), FakeTrainer(1, folder)]
    module: Any = SimpleNamespace()
    for writer, trainer, batches in zip(writers, trainers, outputs_of_ranks, strict=True):
        writer.on_predict_start(trainer, module)  # type: ignore[arg-type]
        for index, outputs in enumerate(batches):
            writer.write_on_batch_end(trainer, module, outputs, None, None, index, 0)  # type: ignore[arg-type]

    def all_gather_object(found: list[Any], own: Any) -> None:
        rows = [writer._rows for writer in writers]
        left_out = [[*NamedImages.left_out, *trainer.predict_dataloaders[0].left_out] for trainer in trainers]
        found[:] = rows if own in rows else left_out

    monkeypatch.setattr("torch.distributed.all_gather_object", all_gather_object)
    for writer, trainer in zip(writers, trainers, strict=True):
        writer.on_predict_epoch_end(trainer, module)  # type: ignore[arg-type]
    return writers, trainers


def test_two_ranks_write_one_sorted_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (first, second), _ = run_ranks(monkeypatch, tmp_path)
    assert first.left_out == second.left_out == [f"{name} is broken" for name in (6, 7, 8, 9)]
    assert first.count == second.count == 8
    assert second.written is None
    assert first.written == tmp_path / "predictions.csv"
    assert read(first.written) == [
        ("predict/0.png", "cat", 0.5),
        ("predict/1.png", "dog, small", 0.625),
        ("predict/2.png", "dog, small", 0.75),
        ("predict/3.png", "cat", 1.0),
    ]


def test_all_ranks_make_the_same_collective_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, (first, second) = run_ranks(monkeypatch, tmp_path)
    assert first.collectives == second.collectives


@pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded|barrier|nn.parallel).*")
def test_two_processes_write_the_same_as_one(small: Networks, make_trainer: Trainers, tmp_path: Path) -> None:
    module, paths = TeacherModule(small()), [tmp_path / "one.csv", tmp_path / "two.csv"]
    for path, options in zip(paths, ({}, {"strategy": "ddp_fork", "devices": 2}), strict=True):
        trainer = make_trainer(callbacks=[PredictionWriter(str(path))], **options)
        trainer.predict(module, DigitsDataModule(batch_size=77), return_predictions=False)
    assert len(read(paths[0])) == 360
    assert read(paths[0]) == read(paths[1])
    trainer = make_trainer(callbacks=[PredictionWriter()], strategy="ddp_fork", devices=2)
    trainer.predict(module, DigitsDataModule(batch_size=77), return_predictions=False)
    assert read(tmp_path / "predictions.csv") == read(paths[0])
