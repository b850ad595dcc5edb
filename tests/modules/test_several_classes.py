"""Images of several classes: what is learned, measured, chosen and saved."""

import copy
import json
import logging
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from made_photographs import write_several_classes
from resume_check import check_resume
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from unusual_networks import with_group_norms

from kd_lightning import (
    AdaptationModule,
    Augmentation,
    Checkpoint,
    DigitsDataModule,
    DistillationModule,
    ImageFolderDataModule,
    TeacherModule,
)
from kd_lightning.callbacks import GapClosed, PredictionWriter, RunSummary, TensorBoardImages
from kd_lightning.callbacks.label_scores import label_scores
from kd_lightning.callbacks.teacher_check import describe_random_order
from kd_lightning.errors import UserError
from kd_lightning.losses import (
    BinaryTargetLoss,
    HardTargetLoss,
    HintLoss,
    SoftTargetLoss,
    binary_soft_target_loss,
    binary_target_loss,
)
from kd_lightning.networks import DataConfig, EnsembleTeacher, ResNet, data_config, from_checkpoint

Trainers = Callable[..., pl.Trainer]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_several_classes(tmp_path_factory.mktemp("photographs"), 180, unlabelled=12)


def data(folder: Path, **options: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(
        str(folder), labels="labels.csv", **{"image_size": 24, "batch_size": 16, "val_fraction": 0.25, **options}
    )


def network(width: int = 8, classes: int = 3) -> ResNet:
    return ResNet([1, 1], [width, 2 * width], classes, in_channels=3)


class PlainData(pl.LightningDataModule):
    """A data module of a user's own: plain loaders, and the declaration."""

    multi_label = True

    def __init__(self, labels: Tensor | None = None, images: int = 40) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        pictures = torch.randn(images, 3, 8, 8, generator=generator)
        self.labels = (pictures.mean((2, 3)) > 0).long() if labels is None else labels
        self.dataset = TensorDataset(pictures, self.labels)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=8)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


QUIET = pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*mean and deviation.*")


# --- training


def test_a_teacher_learns_and_its_test_uses_the_thresholds_of_val(
    photographs: Path, make_trainer: Trainers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    best = ModelCheckpoint(tmp_path / "checkpoints", "best", monitor="val/accuracy", mode="max")
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    trainer = make_trainer(
        max_epochs=12, enable_checkpointing=True, callbacks=[best, RunSummary(0.01), TensorBoardImages()], logger=logger
    )
    module, photos = TeacherModule(network(), learning_rate=0.05), data(photographs)
    trainer.fit(module, photos)
    assert "ModelCheckpoint follows val/map (mean average precision) and not val/accuracy." in caplog.text
    metrics = trainer.callback_metrics
    assert not [name for name in metrics if "accuracy" in name]
    assert {"val/map", "val/f1_micro", "val/f1_macro", "val/loss", "train/loss"} <= set(metrics)
    assert all(value.isfinite() for value in metrics.values())
    assert metrics["val/map"] > 0.8
    saved = Checkpoint(best.best_model_path)
    thresholds = saved.data_config.thresholds
    assert thresholds is not None
    assert thresholds != (0.5, 0.5, 0.5)
    assert saved.data_config.classes == photos.classes

    restored = TeacherModule(network())
    again = ModelCheckpoint(tmp_path / "checkpoints", "best", monitor="val/accuracy", mode="max")
    evaluator = make_trainer(
        enable_checkpointing=True, callbacks=[again, RunSummary(0.01), TensorBoardImages()], logger=logger
    )
    (tested,) = evaluator.test(restored, data(photographs), ckpt_path=best.best_model_path, weights_only=True)
    assert data_config(restored.network).thresholds == thresholds  # the test chooses none
    assert restored.confusion is None
    images = evaluator.datamodule.test_dataloader()  # type: ignore[attr-defined]
    batches = [evaluator.datamodule.augment(batch) for batch in images]  # type: ignore[attr-defined]
    with torch.no_grad():
        logits = torch.cat([restored.eval()(batch.images) for batch in batches])
    expected = label_scores(logits, torch.cat([batch.labels for batch in batches]), torch.tensor(thresholds))
    for name, value in expected.averages.items():
        assert tested[f"test/{name}"] == pytest.approx(value.item(), abs=1e-6)
    written = json.loads((tmp_path / "run" / "test.json").read_text())
    assert written["map"] == pytest.approx(tested["test/map"], abs=1e-6)
    assert written["classes"]["red"]["threshold"] == pytest.approx(thresholds[2], abs=1e-6)
    assert written["classes"]["red"]["images"] == int(expected.images[2])
    assert set(written["classes"]["red"]) == {
        "images", "average_precision", "f1", "precision", "recall", "threshold"}  # fmt: skip


def test_the_step_is_the_binary_cross_entropy_of_the_labelled_rows(photographs: Path, make_trainer: Trainers) -> None:
    found: list[tuple[Tensor, Tensor]] = []

    class Recorded(TeacherModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.network.eval()
            found.append((loss.detach(), batch.labels))
            return loss

        def log_step(self, loss: Tensor, terms: Any, logits: Tensor, labels: Tensor, tensors: Any) -> None:
            expected = binary_target_loss(logits, labels, label_smoothing=0.1, positive_weights=self.class_weights)
            assert torch.equal(loss, expected)
            super().log_step(loss, terms, logits, labels, tensors)

    module = Recorded(network(4), label_smoothing=0.1, class_weights="balanced")
    photos = data(photographs, augmentation=Augmentation(mixup=0.5))
    make_trainer(limit_train_batches=3, limit_val_batches=0).fit(module, photos)
    assert len(found) == 3
    assert any((labels == -1).all(1).any() for _, labels in found)
    labels = photos.splits["train"].labels[photos.train_samples]
    labels = labels[(labels >= 0).all(1)]
    torch.testing.assert_close(module.class_weights, (labels == 0).sum(0) / (labels == 1).sum(0))


def test_a_student_is_distilled_by_binary_losses(
    photographs: Path, make_trainer: Trainers, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    teacher = TeacherModule(network(), learning_rate=0.05)
    make_trainer(max_epochs=8).fit(teacher, data(photographs))
    module = DistillationModule(network(4), teacher.network, alpha=0.6)
    trainer = make_trainer(max_epochs=2, limit_train_batches=4)
    trainer.fit(module, data(photographs))
    kinds = {name: (type(term).__name__, term.weight) for name, term in module.losses.terms.items()}
    assert kinds == {"hard": ("BinaryTargetLoss", 0.4), "soft": ("BinarySoftTargetLoss", 0.6)}
    assert module.losses.terms["soft"].temperature == 1
    assert "the student learns by BinaryTargetLoss (0.4), BinarySoftTargetLoss (0.6)." in caplog.text
    assert re.search(r"The teacher's mean average precision on the validation images is \d+\.\d\d%\.", caplog.text)
    metrics = trainer.callback_metrics
    assert {"val/agreement", "val/kl", "train/hard", "train/soft"} <= set(metrics)
    photos = data(photographs)
    photos.setup("fit")
    batches = [photos.augment(batch) for batch in photos.val_dataloader()]
    with torch.no_grad():
        module.eval(), teacher.eval()
        s, t = (torch.cat([net(batch.images) for batch in batches]) for net in (module, teacher))
    own, taught = (torch.tensor(data_config(net.network).thresholds) for net in (module, teacher))
    assert own.tolist() != taught.tolist()
    same = (s.sigmoid() > own) == (t.sigmoid() > taught)
    torch.testing.assert_close(metrics["val/agreement"], same.float().mean())
    torch.testing.assert_close(metrics["val/kl"], binary_soft_target_loss(s, t, temperature=1.0), rtol=1e-4, atol=1e-5)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = DistillationModule.load_from_checkpoint(tmp_path / "a.ckpt", student=network(4), teacher=None, alpha=0.6)
    assert {name: (type(term).__name__, term.weight) for name, term in loaded.losses.terms.items()} == kinds
    # the same module on images of one class
    other = DistillationModule(network(4), network(), teacher_check="off")
    other._match_losses("fit")
    assert [type(term) for term in other.losses.terms.values()] == [HardTargetLoss, SoftTargetLoss]


def test_losses_that_do_not_fit_the_data_are_refused_before_the_first_step(
    photographs: Path, make_trainer: Trainers, digits: DigitsDataModule, small: Callable[..., ResNet]
) -> None:
    hint = HintLoss(student_layers=["layer1"])
    module = DistillationModule(network(4), network(), losses={"soft": SoftTargetLoss(), "hint": hint})
    with pytest.raises(UserError, match=r"^The loss 'soft' \(SoftTargetLoss\) is for images of one class, but the data "
                       r"have several classes an image; use BinarySoftTargetLoss in its place \(--model"):  # fmt: skip
        make_trainer().fit(module, data(photographs))
    module = DistillationModule(small(), small(), losses={"hard": BinaryTargetLoss()})
    with pytest.raises(UserError, match=r"'hard' \(BinaryTargetLoss\) is for images of several.*use HardTargetLoss"):
        make_trainer().fit(module, digits)
    with pytest.raises(UserError, match=r"^AdaptationModule adapts classifiers of one class an image, and the data"):
        make_trainer().fit(AdaptationModule(network()), PlainData())
    with pytest.raises(UserError, match=r"^GapClosed compares accuracies, but an image may have several classes"):
        make_trainer(callbacks=[GapClosed(0.5)]).fit(DistillationModule(network(4), network()), data(photographs))


def test_networks_for_the_other_kind_of_data_are_refused(photographs: Path, make_trainer: Trainers) -> None:
    single, several = network(), network()
    single.data_config = DataConfig.of(classes=["blue", "green", "red"])  # type: ignore[assignment]
    several.data_config = DataConfig.of(classes=["blue", "green", "red"], thresholds=[0.5] * 3)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"^The teacher was trained on images of one class, and the data have several"):
        make_trainer().fit(DistillationModule(network(), single), data(photographs))
    with pytest.raises(UserError, match=r"^The network was trained on images of one class, and the data have several"):
        make_trainer().test(TeacherModule(single), data(photographs))
    ensemble = EnsembleTeacher([several, network()], average="probabilities")
    assert ensemble.data_config.thresholds == (0.5,) * 3
    images = torch.rand(2, 3, 8, 8)
    expected = torch.stack([member.eval()(images).sigmoid() for member in ensemble.networks]).mean(0)
    torch.testing.assert_close(ensemble.eval()(images).sigmoid(), expected)


# --- other data modules


@QUIET
def test_a_users_own_data_module_declares_it(make_trainer: Trainers, tmp_path: Path) -> None:
    trainer = make_trainer(max_epochs=3, callbacks=[EarlyStopping("val/accuracy", mode="max", patience=9)])
    module = TeacherModule(network(4), learning_rate=0.01)
    trainer.fit(module, PlainData())
    assert "val/map" in trainer.callback_metrics
    thresholds = data_config(module.network).thresholds
    assert thresholds is not None
    assert len(thresholds) == 3
    writer = PredictionWriter(str(tmp_path / "predictions.csv"))
    predicted: Any = make_trainer(callbacks=[writer]).predict(module, PlainData())
    first = predicted[0]
    assert first.labels.dtype == torch.bool
    assert first.probabilities.shape == (8, 3)
    rows = (tmp_path / "predictions.csv").read_text().splitlines()
    assert rows[0] == "image,label,probability"
    for row, given, probabilities in zip(rows[1:9], first.labels, first.probabilities, strict=True):
        _, label, written = row.split(",")
        names = [] if label == "-" else label.split(";")
        assert sorted(names) == [str(c) for c in range(3) if given[c]]
        assert written == ";".join(f"{probabilities[int(c)]:.6f}" for c in names)


@QUIET
@pytest.mark.parametrize("declared", [True, False])
def test_rows_of_zeros_and_ones_need_the_declaration(declared: bool, make_trainer: Trainers) -> None:
    plain = PlainData()
    plain.multi_label = declared
    trainer = make_trainer(limit_train_batches=1, limit_val_batches=0)
    if declared:
        trainer.fit(TeacherModule(network(4)), plain)
        return
    with pytest.raises(UserError, match=r"one column for each class; .* declare multi_label = True in the data module"):
        trainer.fit(TeacherModule(network(4)), plain)


@QUIET
def test_labels_out_of_range_are_refused(make_trainer: Trainers) -> None:
    with pytest.raises(UserError, match=r"The labels contain 2, but of multi-label data they are 1 for each class"):
        make_trainer(num_sanity_val_steps=0).fit(TeacherModule(network(4)), PlainData(torch.full((40, 3), 2)))
    with pytest.raises(UserError, match=r"have the shape \(8, 5\), but the data declare multi_label and there are 3"):
        make_trainer(num_sanity_val_steps=0).fit(TeacherModule(network(4)), PlainData(torch.ones(40, 5)))


@QUIET
def test_a_class_without_images_gives_no_nan_and_no_warning(make_trainer: Trainers) -> None:
    labels = torch.zeros(40, 3, dtype=torch.long)
    labels[::2, 0] = 1
    trainer = make_trainer(max_epochs=1)
    module = TeacherModule(network(4))
    trainer.fit(module, PlainData(labels))
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
    assert module.label_scores is not None
    assert module.label_scores.average_precision.isnan().tolist() == [False, True, True]
    assert data_config(module.network).thresholds[1:] == (0.5, 0.5)  # type: ignore[index]
    trainer = make_trainer(max_epochs=1)
    trainer.fit(TeacherModule(network(4)), PlainData(torch.zeros(40, 3, dtype=torch.long)))
    assert "val/map" not in trainer.callback_metrics  # there is no order to measure
    assert trainer.callback_metrics["val/loss"].isfinite()


def test_a_plateau_of_the_accuracy_is_one_of_the_mean_average_precision(
    photographs: Path, make_trainer: Trainers
) -> None:
    scheduler = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="max")
    module = TeacherModule(network(4), lr_scheduler=scheduler, lr_monitor="val/accuracy")
    make_trainer(limit_train_batches=1).fit(module, data(photographs))
    assert module.optimization.lr_monitor == "val/map"


def test_without_validation_the_thresholds_are_neutral(photographs: Path, make_trainer: Trainers) -> None:
    module = TeacherModule(network(4))
    make_trainer(limit_val_batches=0, limit_train_batches=1).fit(module, data(photographs))
    assert data_config(module.network).thresholds == (0.5, 0.5, 0.5)


def test_a_checkpoint_fills_another_network_with_its_thresholds(
    photographs: Path, make_trainer: Trainers, tmp_path: Path
) -> None:
    trainer = make_trainer(max_epochs=1, limit_train_batches=2)
    module = TeacherModule(network(4))
    trainer.fit(module, data(photographs))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    filled = from_checkpoint(network(4), tmp_path / "a.ckpt")
    assert data_config(filled).thresholds == data_config(module.network).thresholds is not None
    # a fine-tuning on the same classes continues with them
    again = TeacherModule(filled)
    make_trainer(limit_train_batches=1, limit_val_batches=0).fit(again, data(photographs))
    assert data_config(filled).thresholds == data_config(module.network).thresholds


# --- the teacher's check


def test_a_teacher_that_orders_the_images_at_random_is_refused(photographs: Path, make_trainer: Trainers) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, images: Tensor) -> Tensor:
            noise = (images.flatten(1) * 1e4).sum(1, keepdim=True).sin() + self.weight
            return noise * torch.tensor([1.0, -1.0, 0.5])

    module = DistillationModule(network(4), Flat())
    found = (
        r"^The teacher's mean average precision on 41 validation images is .*, which is no better than a random order"
    )
    with pytest.raises(UserError, match=found):
        make_trainer().fit(module, data(photographs, batch_size=64))


def test_few_images_do_not_decide() -> None:
    reason, certain = describe_random_order(0.6, torch.linspace(0.3, 0.9, 200), 4)
    assert not certain
    assert reason.endswith(
        "4 validation images is 60.0%, too few images to decide whether it is better than a random order (60.0%)."
    )
    assert describe_random_order(0.95, torch.linspace(0.3, 0.9, 200), 4) == ("", False)


# --- several processes, and a run that is interrupted


@pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded|barrier|nn.parallel).*")
def test_two_processes_give_the_metrics_and_thresholds_of_one(
    photographs: Path, make_trainer: Trainers, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    start, teacher = with_group_norms(network()), with_group_norms(network())

    class Kept(pl.Callback):
        def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            state = {"weights": pl_module.state_dict(), "metrics": dict(trainer.callback_metrics)}
            thresholds = torch.tensor(data_config(pl_module.network).thresholds)
            torch.save({**state, "thresholds": thresholds}, tmp_path / f"{trainer.world_size}-{trainer.global_rank}.pt")

    for world, batch_size in ((1, 32), (2, 16)):
        options = {"strategy": "ddp_fork", "devices": 2} if world == 2 else {"devices": 1}
        module = DistillationModule(
            copy.deepcopy(start), teacher, teacher_check="warn", class_weights="balanced", learning_rate=0.02
        )
        augmentation = Augmentation(mixup=0.5)
        # each rank averages over its own labelled rows, so all are
        photos = data(photographs, batch_size=batch_size, augmentation=augmentation, labelled_only=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*mean average precision.*")
            make_trainer(max_epochs=2, num_sanity_val_steps=0, callbacks=[Kept()], **options).fit(module, photos)
    single, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert torch.equal(first["thresholds"], second["thresholds"])
    torch.testing.assert_close(first["thresholds"], single["thresholds"], rtol=0, atol=1e-3)
    for name, value in single["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-3, atol=1e-4)
    for name in ("val/map", "val/f1_micro", "val/f1_macro", "val/loss", "val/kl", "val/agreement"):
        torch.testing.assert_close(first["metrics"][name], second["metrics"][name])
        torch.testing.assert_close(first["metrics"][name], single["metrics"][name], rtol=1e-2, atol=1e-3)


def test_an_interrupted_run_resumes_to_the_same_bits(photographs: Path, make_trainer: Trainers, tmp_path: Path) -> None:
    check_resume(
        partial(make_trainer, max_epochs=3, limit_train_batches=3, limit_val_batches=2),
        tmp_path,
        lambda: data(photographs, augmentation=Augmentation(mixup=0.5)),
        DistillationModule,
        student=lambda: network(4),
        teacher=lambda: network(4),
        teacher_check=lambda: "off",
        class_weights=lambda: "balanced",
    )
