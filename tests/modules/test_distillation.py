import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from mostly_slow import mostly_slow
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Augmentation, DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.data.image_set import ImageSet
from kd_lightning.features import Outputs
from kd_lightning.losses import (
    AttentionLoss,
    ContrastiveLoss,
    DecoupledLoss,
    DistillationLoss,
    HardTargetLoss,
    MLLDLoss,
    MMDLoss,
    NKDLoss,
    QueueKLLoss,
    RLDLoss,
    SDDDKDLoss,
    SDDKDLoss,
    SKDLoss,
    SoftTargetLoss,
    TTMLoss,
    USKDLoss,
    WKDLogitLoss,
)
from kd_lightning.losses._labels import class_indices
from kd_lightning.networks import DataConfig, ResNet, data_config, from_checkpoint, resnet18, set_data_config

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]


class ProjectionLoss(DistillationLoss):
    """A user's own loss, with a learned part built from the shapes of a dry run."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight=weight, student_layers=["layer2"], teacher_layers=["layer1"])

    def build(self, student: Outputs, teacher: Outputs, **networks: nn.Module | None) -> None:
        self.project = nn.Linear(student.features["layer2"].shape[1], teacher.features["layer1"].shape[1])

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        projected = self.project(student.features["layer2"].mean((2, 3)))
        return F.mse_loss(projected, teacher.features["layer1"].mean((2, 3)))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    network = ResNet([1, 1], [8, 16], in_channels=1)
    torch.manual_seed(0)
    options: dict[str, Any] = dict.fromkeys(
        ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False
    )
    trainer = pl.Trainer(max_epochs=5, accelerator="cpu", log_every_n_steps=1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(TeacherModule(network), DigitsDataModule(batch_size=32))
    return network


# --- the loss


@pytest.mark.parametrize(("temperature", "alpha"), [(4.0, 0.9), (1.0, 0.0), (2.5, 1.0)])
def test_the_loss_equals_the_published_formula(
    small: Networks,
    trained: nn.Module,
    digits: DigitsDataModule,
    make_trainer: Trainers,
    monkeypatch: pytest.MonkeyPatch,
    temperature: float,
    alpha: float,
) -> None:
    student = small().double().eval()
    teacher = copy.deepcopy(trained).double().eval()
    module = DistillationModule(student, teacher, temperature=temperature, alpha=alpha).eval()
    module.trainer = make_trainer()
    module.trainer.strategy.connect(module)
    monkeypatch.setattr(module, "log_step", lambda *_: None)
    images, labels = torch.randn(16, 1, 8, 8).double(), torch.randint(10, (16,))
    loss = module.training_step((images, labels), 0)
    s, t = student(images), teacher(images)
    p, q = (t / temperature).softmax(1), (s / temperature).softmax(1)
    divergence = (p * (p.log() - q.log())).sum() / 16
    hard = -s.log_softmax(1)[torch.arange(16), labels].mean()
    torch.testing.assert_close(loss, (1 - alpha) * hard + alpha * temperature**2 * divergence)


def test_terms_are_logged_without_their_weights(
    small: Networks, trained: nn.Module, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    trainer = make_trainer()
    trainer.fit(DistillationModule(small(), trained, alpha=0.7), digits)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["train/loss"] == pytest.approx(0.3 * metrics["train/hard"] + 0.7 * metrics["train/soft"], rel=1e-5)
    assert {"val/agreement", "val/kl"} <= set(metrics)


class TermWithMetric(DistillationLoss):
    """A user's own term, which logs the progress of the training."""

    needs_teacher = False

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        self.metrics = {"progress": self.progress.clone(), "epoch": self.epoch.float()}
        return self.progress * student.logits.square().mean()


def test_metrics_of_a_term_are_logged(
    small: Networks, trained: nn.Module, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    trainer = make_trainer(max_epochs=2, limit_val_batches=0)
    trainer.fit(
        DistillationModule(small(), trained, losses={"hard": HardTargetLoss(), "mine": TermWithMetric()}), digits
    )
    steps = trainer.global_step
    progress_of_epoch = [step / steps for step in range(steps // 2, steps)]
    logged = trainer.callback_metrics
    sizes = [len(batch.labels) for batch in digits.train_dataloader()]
    mean = sum(size * progress for size, progress in zip(sizes, progress_of_epoch, strict=True)) / sum(sizes)
    assert logged["train/mine_progress"].item() == pytest.approx(mean, rel=1e-5)
    assert logged["train/mine_epoch"] == 1


def test_without_a_term_that_needs_a_teacher_none_is_required(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    """The weights equal those of a TeacherModule."""
    trainer, teacher_trainer = make_trainer(max_epochs=2), make_trainer(max_epochs=2)
    network = small()
    module, student = (
        DistillationModule(network, losses={"hard": HardTargetLoss()}),
        TeacherModule(copy.deepcopy(network)),
    )
    trainer.fit(module, digits)
    teacher_trainer.fit(student, digits)
    for name, value in student.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    assert "val/agreement" not in trainer.callback_metrics
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    DistillationModule.load_from_checkpoint(
        tmp_path / "student.ckpt", student=small(), losses={"hard": HardTargetLoss()}
    )
    assert make_trainer().test(module, digits)[0]["test/accuracy"] > 0


def test_a_student_learns_from_soft_targets_alone(small: Networks, trained: nn.Module, make_trainer: Trainers) -> None:
    """With alpha 1 no label is used."""
    trainer = make_trainer(max_epochs=8)
    trainer.fit(DistillationModule(small(8), trained, alpha=1.0), DigitsDataModule(batch_size=32))
    assert trainer.callback_metrics["val/agreement"] > 0.85


def test_warmup_epochs_scale_the_weight(
    small: Networks, trained: nn.Module, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    losses: dict[str, DistillationLoss] = {"soft": SoftTargetLoss(weight=2.0, warmup_epochs=4)}
    trainer = make_trainer()
    trainer.fit(DistillationModule(small(), trained, losses=losses), digits)
    metrics = trainer.callback_metrics
    torch.testing.assert_close(metrics["train/loss"], 0.5 * metrics["train/soft"])


# --- the teacher does not change


def test_the_teacher_stays_frozen_and_in_eval_mode(small: Networks, trained: nn.Module, make_trainer: Trainers) -> None:
    original = copy.deepcopy(trained).train()
    before = copy.deepcopy(original.state_dict())
    module = DistillationModule(small(), original)
    teacher = module.teacher
    assert teacher is not None
    assert teacher is not original
    modes: list[bool] = []
    teacher.register_forward_pre_hook(lambda network, _: modes.append(any(m.training for m in network.modules())))
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, DigitsDataModule(batch_size=64))
    assert modes
    assert not any(modes)
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key
        assert torch.equal(original.state_dict()[key], before[key]), key
    assert all(weight.grad is None and not weight.requires_grad for weight in teacher.parameters())
    assert original.training
    assert all(weight.requires_grad for weight in original.parameters())
    optimized = {id(weight) for group in trainer.optimizers[0].param_groups for weight in group["params"]}
    assert optimized == {id(weight) for weight in module.student.parameters()}


def test_train_does_not_change_the_mode_of_the_teacher(small: Networks) -> None:
    module = DistillationModule(small(), small()).eval().train()
    assert module.student.training
    assert module.teacher is not None
    assert not any(part.training for part in module.teacher.modules())


def test_the_state_dict_has_no_teacher_and_is_loaded_strictly(small: Networks) -> None:
    module = DistillationModule(small(), small(8))
    state = module.state_dict()
    assert state
    assert all(key.startswith("network.") for key in state)
    assert DistillationModule(small(), small(8)).load_state_dict(state).missing_keys == []
    del state["network.fc.bias"]
    with pytest.raises(ValueError, match=r"does not fit .*missing: network\.fc\.bias"):
        module.load_state_dict(state)
    with pytest.raises(ValueError, match=r"does not fit .*unexpected: surprise"):
        module.load_state_dict({**module.state_dict(), "surprise": torch.zeros(1)})


def test_images_are_normalized_for_the_teacher(small: Networks, trained: nn.Module, make_trainer: Trainers) -> None:
    """The accuracy of a teacher whose statistics are known does not depend on those of the data."""
    data = DigitsDataModule(mean=(5.0,), std=(0.05,))
    known, unknown = copy.deepcopy(trained), copy.deepcopy(trained)
    set_data_config(unknown, DataConfig())
    agreement = {}
    for name, teacher in {"known": known, "unknown": unknown}.items():
        module = DistillationModule(teacher, teacher, teacher_check="off")
        module.trainer = make_trainer()
        module.trainer.strategy.connect(module)
        module.trainer.datamodule = data  # type: ignore[attr-defined]
        data.setup("test")
        module.setup("test")
        correct = []
        for images, labels, *_ in map(data.augment, data.test_dataloader()):
            logits = module.reference_logits(images)
            assert logits is not None
            correct.append((logits.argmax(1) == labels).float().mean())
        agreement[name] = float(torch.stack(correct).mean())
    assert agreement["known"] > 0.9
    assert agreement["unknown"] < 0.5


# --- checkpoints


def test_a_checkpoint_is_plain_data_and_can_be_loaded_as_network(
    small: Networks, trained: nn.Module, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    trainer = make_trainer()
    module = DistillationModule(small(), trained, alpha=0.5)
    trainer.fit(module, digits)
    path = tmp_path / "student.ckpt"
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    expected = {"mean": digits.mean, "std": digits.std, "classes": digits.classes, "preparation": None}
    expected["train_size"] = expected["thresholds"] = None
    assert content["data_config"] == expected
    network = from_checkpoint(small(), path)
    images = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(network.eval()(images), module.eval()(images))  # in another memory format
    loaded = DistillationModule.load_from_checkpoint(path, student=small(), teacher=None)
    assert loaded.losses["soft"].weight == 0.5
    results = make_trainer().test(loaded, digits)[0]
    assert "test/agreement" not in results
    assert results["test/accuracy"] == make_trainer().test(module, digits)[0]["test/accuracy"]


def test_learned_parts_of_losses_are_trained_saved_and_rebuilt(
    small: Networks, trained: nn.Module, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    def build() -> DistillationModule:
        return DistillationModule(small(), trained, losses={"hard": HardTargetLoss(), "mine": ProjectionLoss()})

    untrained: list[Tensor] = []

    class KeepUntrained(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            untrained.append(pl_module.get_parameter("losses.mine.project.weight").detach().clone())

    module, trainer = build(), make_trainer(callbacks=[KeepUntrained()])
    trainer.fit(module, digits)
    trained_weight = module.get_parameter("losses.mine.project.weight")
    assert not torch.equal(trained_weight, untrained[0])
    path = tmp_path / "student.ckpt"
    trainer.save_checkpoint(path)
    options: dict[str, Any] = {"losses": {"hard": HardTargetLoss(), "mine": ProjectionLoss()}}
    loaded = DistillationModule.load_from_checkpoint(path, student=small(), teacher=None, **options)
    assert torch.equal(loaded.get_parameter("losses.mine.project.weight"), trained_weight)
    resumed = make_trainer(max_epochs=2)
    resumed.fit(build(), digits, ckpt_path=path, weights_only=True)
    assert resumed.current_epoch == 2
    assert from_checkpoint(small(), path) is not None  # without the learned parts of losses


@pytest.mark.parametrize(
    "hyper_parameters",
    [
        {"student": {"class_path": "evil_package.Evil"}},
        {
            "student": {
                "class_path": "torch.nn.Sequential",
                "init_args": {"a": [{"class_path": "evil_package.Evil"}]},
            }
        },
        {"_class_path": "evil_package.Evil"},
    ],
)
def test_loading_a_checkpoint_does_not_import_its_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hyper_parameters: dict[str, Any]
) -> None:
    (tmp_path / "evil_package.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "foreign.ckpt"
    content = {"state_dict": {"a": torch.zeros(1)}, "kd_lightning_format": 1}
    torch.save({**content, "hyper_parameters": hyper_parameters}, path)
    with pytest.raises(ValueError, match=r"names the class 'evil_package\.Evil'"):
        DistillationModule.load_from_checkpoint(path)
    assert not (tmp_path / "ran").exists()


# --- the test split


class RecordLoadedSplits(DigitsDataModule):
    __test__ = False
    read: list[str] = []  # noqa: RUF012

    def load(self, split: str) -> Any:
        self.read.append(split)
        return super().load(split)


def test_the_test_split_is_loaded_only_by_test(small: Networks, trained: nn.Module, make_trainer: Trainers) -> None:
    data = RecordLoadedSplits(batch_size=256)
    data.read.clear()
    module = DistillationModule(small(), trained)
    make_trainer().fit(module, data)
    make_trainer().validate(module, data)
    assert "test" not in data.read
    make_trainer().test(module, data)
    assert data.read.count("test") == 1


# --- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0"),
        ({"temperature": -1.0}, "temperature must be above 0, got -1"),
        ({"temperature": math.nan}, "temperature must be above 0, got nan"),
        ({"alpha": 1.1}, r"alpha.*must be in \[0, 1\], got 1.1"),
        ({"alpha": -0.1}, r"alpha.*must be in \[0, 1\], got -0.1"),
        ({"alpha": 0.5, "losses": {"hard": HardTargetLoss()}}, "either losses.*or temperature and alpha; not both"),
        ({"temperature": 4.0, "losses": {"hard": HardTargetLoss()}}, "either losses.*not both"),
        ({"losses": {}}, "at least one term"),
        ({"losses": {"accuracy": HardTargetLoss()}}, "cannot be called 'accuracy'"),
        ({"losses": {"type": HardTargetLoss()}}, "cannot be called 'type'; choose a plain word"),
        ({"losses": {"a.b": HardTargetLoss()}}, "cannot be called 'a.b'"),
        ({"losses": {"": HardTargetLoss()}}, "cannot be called ''"),
    ],
)
def test_invalid_arguments_are_refused(small: Networks, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationModule(small(), small(), **options)


def test_a_teacher_of_lazy_layers_is_refused(small: Networks) -> None:
    with pytest.raises(ValueError, match=r"LazyLinear has weights that have no shape yet \('weight'\)"):
        DistillationModule(small(), nn.LazyLinear(10))


def test_fit_without_a_teacher_is_refused(small: Networks, digits: DigitsDataModule, make_trainer: Trainers) -> None:
    with pytest.raises(ValueError, match="needs a teacher to fit"):
        make_trainer().fit(DistillationModule(small()), digits)


def test_class_counts_must_match_if_a_loss_compares_logits(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    with pytest.raises(ValueError, match=r"teacher has 7 classes and the student 10, but the loss 'soft'"):
        make_trainer().fit(DistillationModule(small(), small(num_classes=7)), digits)
    trainer = make_trainer(fast_dev_run=True)
    features: dict[str, DistillationLoss] = {"mine": ProjectionLoss()}
    trainer.fit(DistillationModule(small(), small(num_classes=7), losses=features), digits)
    assert "val/agreement" not in trainer.callback_metrics


def test_class_names_must_match(
    small: Networks, trained: nn.Module, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    teacher = copy.deepcopy(trained)
    set_data_config(teacher, data_config(teacher)._replace(classes=tuple("1023456789")))
    with pytest.raises(ValueError, match=r"teacher was trained on the classes 1, 0, 2.*the data have 0, 1, 2"):
        make_trainer().fit(DistillationModule(small(), teacher), digits)


def test_a_teacher_with_nan_logits_is_refused(
    small: Networks, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    teacher = small()
    nn.init.constant_(teacher.fc.weight, math.nan)
    with pytest.raises(ValueError, match=r"teacher's logits are not finite"):
        make_trainer().fit(DistillationModule(small(), teacher, teacher_check="off"), digits)


def test_a_teacher_at_chance_level_is_refused_before_the_first_step(
    small: Networks, trained: nn.Module, digits: DigitsDataModule, make_trainer: Trainers
) -> None:
    teacher = copy.deepcopy(trained)
    with torch.no_grad():  # classes in another order
        for name in ("fc.weight", "fc.bias"):
            teacher.get_parameter(name).copy_(teacher.get_parameter(name).roll(1, 0))
    trainer = make_trainer()
    with pytest.raises(ValueError, match=r"The teacher classifies \d+ of 287 validation images.*no better than chance"):
        trainer.fit(DistillationModule(small(), teacher), digits)
    assert trainer.global_step == 0
    with pytest.warns(UserWarning, match="no better than chance"):
        make_trainer(fast_dev_run=True).fit(DistillationModule(small(), teacher, teacher_check="warn"), digits)
    make_trainer(fast_dev_run=True).fit(DistillationModule(small(), teacher, teacher_check="off"), digits)


def test_a_network_for_other_channels_is_refused(
    digits: DigitsDataModule, small: Networks, make_trainer: Trainers
) -> None:
    with pytest.raises(ValueError, match=r"fails for float32 images of shape \(1, 8, 8\)"):
        make_trainer().fit(DistillationModule(small(), resnet18()), digits)
    with pytest.raises(ValueError, match=r"fails for float32 images of shape \(1, 8, 8\)"):
        make_trainer().fit(TeacherModule(resnet18()), digits)


# --- other networks, other loaders


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_torchvision_networks_train_on_plain_loaders(make_trainer: Trainers) -> None:
    from torchvision.models import mobilenet_v3_small, resnet18

    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    module = DistillationModule(mobilenet_v3_small(num_classes=4), resnet18(num_classes=4), teacher_check="off")
    trainer = make_trainer()
    trainer.fit(module, loader, loader)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_mixup_and_cutmix_train(small: Networks, trained: nn.Module, make_trainer: Trainers) -> None:
    trainer = make_trainer()
    trainer.fit(
        DistillationModule(small(), trained),
        DigitsDataModule(batch_size=256, augmentation=Augmentation(mixup=0.2, cutmix=1.0)),
    )
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


class PartlyLabelled(DigitsDataModule):
    """Of eight training images seven are unlabelled, so that many a batch has no label."""

    def load(self, split: str) -> ImageSet | None:
        images = super().load(split)
        if images is None or split != "train":
            return images
        hidden = torch.arange(len(images.labels)) % 8 > 0
        return replace(images, labels=images.labels.masked_fill(hidden, -1))


@pytest.mark.parametrize("preset", mostly_slow(["strong", "standard"], "strong"))
def test_losses_on_labels_leave_out_the_unlabelled_among_augmented_images(
    preset: str, small: Networks, trained: nn.Module, make_trainer: Trainers
) -> None:
    steps: list[tuple[tuple[int, ...], int, dict[str, float]]] = []
    values: dict[str, float] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda loss, arguments, value: values.update({name: float(value.detach())})

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            labelled = int((class_indices(batch.labels) >= 0).sum())
            steps.append((tuple(batch.labels.shape), labelled, dict(values)))

    on_labels: dict[str, DistillationLoss] = {
        "hard": HardTargetLoss(),
        "decoupled": DecoupledLoss(warmup_epochs=0),
        "nkd": NKDLoss(),
        "wkd_l": WKDLogitLoss(gamma=1.0),
        "sdd_dkd": SDDDKDLoss(student_layers=["layer2"], warmup_epochs=0),
        "rld": RLDLoss(warmup_epochs=0),
        "uskd": USKDLoss(student_layers=["layer1"]),
    }
    on_all: dict[str, DistillationLoss] = {
        "soft": SoftTargetLoss(4.0),
        "ttm": TTMLoss(weight=1.0),
        "sdd_kd": SDDKDLoss(student_layers=["layer2"]),
        "mlld": MLLDLoss(),
        "skd": SKDLoss(),
        "queue_kl": QueueKLLoss(queue_size=64),
        "contrastive": ContrastiveLoss(queue_size=64),
    }
    losses = {**on_labels, **on_all}
    for name in losses:
        losses[name].register_forward_hook(keep(name))
    trainer = make_trainer(callbacks=[Record()], max_epochs=1)
    data = PartlyLabelled(batch_size=6, augmentation=Augmentation(preset=preset))
    trainer.fit(DistillationModule(small(), trained, losses=losses, teacher_check="off"), data)
    assert {shape for shape, *_ in steps} == ({(6, 10)} if preset == "strong" else {(6,)})
    assert {0, 1, 2} <= {count for _, count, _ in steps}
    for _, count, found in steps[1:]:  # the queue is empty in the first
        assert {name for name in on_labels if found[name] > 0} == (set(on_labels) if count else set())
        assert all(found[name] > 0 for name in on_all)
    for name in ("loss", "accuracy", *losses):
        assert torch.isfinite(trainer.callback_metrics[f"train/{name}"]), name
    assert 0 <= trainer.callback_metrics["train/accuracy"] <= 1


def test_a_teacher_without_logits_is_not_checked_on_the_data(small: Networks, make_trainer: Trainers) -> None:
    class TeacherOfMaps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer2 = nn.Conv2d(1, 4, 3, padding=1)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer2(images)

    losses: dict[str, DistillationLoss] = {
        "hard": HardTargetLoss(),
        "at": AttentionLoss(weight=1.0, student_layers=["layer2"]),
    }
    make_trainer().fit(DistillationModule(small(), TeacherOfMaps(), losses=losses), DigitsDataModule(batch_size=256))


def test_a_layer_whose_output_is_overwritten_in_place_is_refused(make_trainer: Trainers) -> None:
    def network() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 10)
        )

    module = DistillationModule(network(), network(), losses={"at": AttentionLoss(weight=1.0, student_layers=["1"])})
    with pytest.raises(ValueError, match="What layer '1' gives is overwritten in place"):
        make_trainer().fit(module, DigitsDataModule())


def test_loading_asks_for_losses_with_learned_parts(
    small: Networks, trained: nn.Module, digits: DigitsDataModule, make_trainer: Trainers, tmp_path: Path
) -> None:
    trainer = make_trainer()
    losses: dict[str, DistillationLoss] = {"hard": HardTargetLoss(), "mine": ProjectionLoss()}
    trainer.fit(DistillationModule(small(), trained, losses=losses), digits)
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    with pytest.raises(ValueError, match=r"with losses that have learned parts; pass losses=... again as well"):
        DistillationModule.load_from_checkpoint(tmp_path / "student.ckpt", student=small(), teacher=None)


def test_a_loss_between_domains_is_refused(small: Networks) -> None:
    with pytest.raises(ValueError, match=r"'mmd' \(MMDLoss\) compares two domains, not two networks"):
        DistillationModule(small(), small(), losses={"mmd": MMDLoss()})  # type: ignore[dict-item]


def test_a_loss_that_needs_more_views_than_a_batch_has_is_refused(small: Networks, make_trainer: Trainers) -> None:
    class TwoViews(ProjectionLoss):
        views = 2

    module = DistillationModule(small(), small(), losses={"mine": TwoViews()}, teacher_check="off")
    loader = DataLoader(TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8)), batch_size=4)
    for data in ((DigitsDataModule(),), (loader, loader)):
        with pytest.raises(
            ValueError, match=r"'mine' \(TwoViews\) expects 2 views of each image, but batches have 1; set d"
        ):
            make_trainer().fit(module, *data)
