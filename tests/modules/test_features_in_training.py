"""Losses on features train with compiled, copied and averaged networks, and in half precision."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
import torchvision
from lightning.pytorch.callbacks import EMAWeightAveraging
from mostly_slow import mostly_slow
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DigitsDataModule, DistillationModule
from kd_lightning.losses import (
    AttentionLoss,
    ContrastiveLoss,
    CorrelationLoss,
    CTKDLoss,
    DecoupledLoss,
    DistillationLoss,
    DistLoss,
    DistPlusLoss,
    HardTargetLoss,
    HintLoss,
    MLLDLoss,
    NeuronSelectivityLoss,
    NKDLoss,
    OFALoss,
    ProbabilisticLoss,
    QueueKLLoss,
    RelationalLoss,
    ReviewLoss,
    RLDLoss,
    RSDLoss,
    SDDDKDLoss,
    SDDKDLoss,
    SimilarityLoss,
    SKDLoss,
    SoftTargetLoss,
    SRDLoss,
    TTMLoss,
    USKDLoss,
    VariationalLoss,
    ViTKDLoss,
    VkDLoss,
    WKDFeatureLoss,
    WKDLogitLoss,
    WTTMLoss,
)
from kd_lightning.networks import ResNet, resnet20

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]


def every_loss(student: tuple[str, str], teacher: tuple[str, str], size: int = 64) -> dict[str, DistillationLoss]:
    """Return each loss once, for two layers of each network; the second layer is the embedding."""
    maps: dict[str, Any] = {"student_layers": student, "teacher_layers": teacher}
    last: dict[str, Any] = {"student_layers": student[1:], "teacher_layers": teacher[1:]}
    return {
        "hard": HardTargetLoss(),
        "soft": SoftTargetLoss(),
        "standardized": SoftTargetLoss(standardize=True),
        "decoupled": DecoupledLoss(),
        "dist": DistLoss(),
        "nkd": NKDLoss(),
        "ttm": TTMLoss(weight=1.0),
        "wttm": WTTMLoss(),
        "rld": RLDLoss(),
        "wkd_l": WKDLogitLoss(),
        "sdd_kd": SDDKDLoss(**last),
        "sdd_dkd": SDDDKDLoss(**last),
        "mlld": MLLDLoss(),
        "dist_plus": DistPlusLoss(**last),
        "ctkd": CTKDLoss(),
        "skd": SKDLoss(),
        "uskd": USKDLoss(student_layers=student[:1]),
        "queue_kl": QueueKLLoss(queue_size=size, **last),
        "hint": HintLoss(weight=0.1, **maps),
        "attention": AttentionLoss(weight=1.0, **maps),
        "neuron_selectivity": NeuronSelectivityLoss(**maps),
        "similarity": SimilarityLoss(weight=1.0, **last),
        "probabilistic": ProbabilisticLoss(weight=1.0, **last),
        "relational": RelationalLoss(weight=0.1, **last),
        "correlation": CorrelationLoss(**last),
        "variational": VariationalLoss(weight=0.1, **maps),
        "review": ReviewLoss(weight=0.1, **maps),
        "contrastive": ContrastiveLoss(queue_size=size, **last),
        "rsd": RSDLoss(weight=1e-3, **last),
        "ofa": OFALoss(weight=0.1, student_layers=student),
        "vkd": VkDLoss(weight=0.1, **last),
        "srd": SRDLoss(weight=1e-2, **last),
    }


def _digits_module(small: Networks, losses: dict[str, DistillationLoss] | None = None) -> DistillationModule:
    torch.manual_seed(1)
    losses = losses or every_loss(("layer1", "layer2"), ("layer1", "layer2"))
    return DistillationModule(small(), small(8), losses=losses, teacher_check="off")


@pytest.mark.parametrize("precision", mostly_slow(["32-true", "bf16-mixed", "bf16-true", "64-true"], "bf16-mixed"))
def test_all_losses_together_train_in_each_precision(small: Networks, make_trainer: Trainers, precision: str) -> None:
    module, trainer = _digits_module(small), make_trainer(precision=precision, max_epochs=2)
    trainer.fit(module, DigitsDataModule(batch_size=128))
    metrics = trainer.callback_metrics
    assert all(torch.isfinite(metrics[f"train/{name}"]) for name in module.losses)
    assert all(torch.isfinite(weight).all() for weight in module.parameters())


VECTORS_REFUSED = ("attention", "neuron_selectivity", "sdd_kd", "sdd_dkd", "dist_plus")
NETWORKS = {
    "torchvision": (
        lambda: torchvision.models.regnet_y_400mf(num_classes=10),
        ("trunk_output.block2", "trunk_output.block4"),
    ),
    "timm": (lambda: timm.create_model("resnet10t", num_classes=10), ("layer2", "layer4")),
    "transformer": (
        lambda: torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=10),
        ("encoder.ln", "heads"),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_other_libraries_keep_their_state_dict_keys(make_trainer: Trainers, name: str) -> None:
    build, layers = NETWORKS[name]
    student = build()
    keys = list(student.state_dict())
    images = TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % 10)
    losses: dict[str, DistillationLoss] = every_loss(layers, ("layer2", "avgpool"))
    if name == "transformer":  # whose second layer returns vectors
        losses = {n: loss for n, loss in losses.items() if n not in VECTORS_REFUSED}
    module = DistillationModule(student, resnet20(), losses=losses, teacher_check="off", learning_rate=1e-3)
    loader = DataLoader(images, batch_size=8, drop_last=True)
    make_trainer(max_epochs=2).fit(module, loader, loader)
    assert list(student.state_dict()) == keys
    assert all(torch.isfinite(weight).all() for weight in module.parameters())


def _weights(module: DistillationModule) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo reads .grad
@pytest.mark.parametrize("compiled_part", ["network", pytest.param("module", marks=pytest.mark.slow)])
def test_compiled_training_equals_eager_training(small: Networks, make_trainer: Trainers, compiled_part: str) -> None:
    """Traced by Dynamo and run eagerly, since generated code would round differently."""
    weights = []
    for compiled in (False, True):
        losses: dict[str, DistillationLoss] = {
            "hint": HintLoss(weight=1.0, student_layers=["layer2"]),
            "attention": AttentionLoss(weight=1.0, student_layers=["layer1"]),
        }
        module = _digits_module(small, losses)
        trainer = make_trainer(max_steps=3)
        fitted: Any = module
        if compiled and compiled_part == "network":
            module.network.compile(backend="eager")
            assert module.teacher is not None
            module.teacher.compile(backend="eager")
        elif compiled:
            fitted = torch.compile(module, backend="eager")
        trainer.fit(fitted, DigitsDataModule(batch_size=128))
        weights.append(_weights(module))
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, msg=key)


def test_a_deep_copy_trains_to_identical_weights(small: Networks, make_trainer: Trainers) -> None:
    module = _digits_module(small)
    copied = copy.deepcopy(module)
    for trained in (module, copied):
        torch.manual_seed(2)
        make_trainer(max_steps=4).fit(trained, DigitsDataModule(batch_size=128))
    for key, value in _weights(module).items():
        assert torch.equal(copied.state_dict()[key], value), key


def test_learned_parts_are_rebuilt_from_a_checkpoint(small: Networks, make_trainer: Trainers, tmp_path: Path) -> None:
    """Without the teacher, and without the data."""
    layers = ("layer1", "layer2")

    def losses() -> dict[str, DistillationLoss]:
        more: dict[str, DistillationLoss] = {
            "vitkd": ViTKDLoss(student_layers=layers),
            "wkd_f": WKDFeatureLoss(student_layers=layers),
        }
        return {**every_loss(layers, layers), **more}

    module, trainer = _digits_module(small, losses()), make_trainer(max_steps=2)
    trainer.fit(module, DigitsDataModule(batch_size=128))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    rebuilt = DistillationModule.load_from_checkpoint(
        tmp_path / "a.ckpt", student=small(), teacher=None, losses=losses()
    )
    for name, value in module.losses.state_dict().items():
        assert rebuilt.losses.state_dict()[name].equal(value), name
    learned = {name.split(".")[0] for name, _ in module.losses.named_parameters()}
    assert {"hint", "review", "contrastive", "rsd", "ofa", "vkd", "srd", "vitkd", "wkd_f"} <= learned


# --- weight averaging


class RecordAverages(pl.Callback):
    """Computes the moving averages of all parameters without Lightning."""

    def __init__(self, decay: float) -> None:
        self.decay, self.averages = decay, dict[str, Tensor]()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for name, value in pl_module.named_parameters():
            old = self.averages.get(name, value.detach())
            self.averages[name] = self.decay * old + (1 - self.decay) * value.detach()


def _hint(small: Networks) -> DistillationModule:
    return _digits_module(small, {"hard": HardTargetLoss(), "hint": HintLoss(weight=1.0, student_layers=["layer2"])})


def test_averaged_weights_are_saved_and_the_teacher_is_not_averaged(
    small: Networks, make_trainer: Trainers, tmp_path: Path
) -> None:
    module, averages = _hint(small), RecordAverages(0.9)
    teacher = copy.deepcopy(module.teacher)
    trainer = make_trainer(max_epochs=2, callbacks=[averages, EMAWeightAveraging(decay=0.9)])
    data = DigitsDataModule(batch_size=128)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "averaged.ckpt")
    saved = torch.load(tmp_path / "averaged.ckpt", weights_only=True)
    assert not any(key.startswith("teacher.") for part in saved.values() if isinstance(part, dict) for key in part)
    names = [name for name in averages.averages if not name.startswith("teacher.")]
    assert any(name.startswith("losses.hint.") for name in names)
    for name in names:
        torch.testing.assert_close(saved["state_dict"][name], averages.averages[name], rtol=1e-4, atol=1e-6)
    assert teacher is not None
    assert module.teacher is not None
    for name, value in teacher.state_dict().items():
        assert torch.equal(module.teacher.state_dict()[name], value), name
    results = make_trainer().test(module, data)[0]
    loaded = DistillationModule.load_from_checkpoint(
        tmp_path / "averaged.ckpt",
        student=small(),
        teacher=None,
        losses={"hard": HardTargetLoss(), "hint": HintLoss(weight=1.0, student_layers=["layer2"])},
    )
    assert make_trainer().test(loaded, data)[0]["test/loss"] == pytest.approx(results["test/loss"])


class SaveAfterFirstEpoch(pl.Callback):
    """Saves a checkpoint after the first epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def test_an_averaged_run_resumes_to_identical_weights(small: Networks, make_trainer: Trainers, tmp_path: Path) -> None:
    def run(path: Path | None = None) -> dict[str, Tensor]:
        module = _hint(small)
        callbacks = [EMAWeightAveraging(decay=0.9), SaveAfterFirstEpoch(tmp_path / "first.ckpt")]
        trainer = make_trainer(max_epochs=3, callbacks=callbacks)
        trainer.fit(module, DigitsDataModule(batch_size=128), ckpt_path=path, weights_only=True)
        return module.state_dict()

    expected = run()
    for key, value in run(tmp_path / "first.ckpt").items():
        assert torch.equal(value, expected[key]), key
