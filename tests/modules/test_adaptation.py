"""Adaptation from a labelled source to an unlabelled target."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from resume_check import SaveAfterEachBatch
from torch import Tensor, nn

from kd_lightning import AdaptationModule, DigitsDataModule, DomainPairDataModule
from kd_lightning.features import FeatureTap
from kd_lightning.losses import (
    AdversarialLoss,
    AlignmentLoss,
    HardTargetLoss,
    MMDLoss,
    SoftTargetLoss,
    hard_target_loss,
    mmd_loss,
)
from kd_lightning.networks import ResNet

Trainers = Callable[..., pl.Trainer]


def network() -> ResNet:
    torch.manual_seed(0)
    return ResNet([1, 1], [4, 8], in_channels=1)


def pair(batch_size: int = 128, target: DigitsDataModule | None = None) -> DomainPairDataModule:
    """Return digits as source, and brighter ones with another split as target."""
    target = DigitsDataModule(mean=(0.5,), std=(0.2,), seed=1) if target is None else target
    return DomainPairDataModule(DigitsDataModule(batch_size=batch_size), target)


def losses() -> dict[str, AlignmentLoss | HardTargetLoss]:
    return {
        "hard": HardTargetLoss(),
        "mmd": MMDLoss(weight=0.5),
        "domain": AdversarialLoss(weight=0.1, hidden=16),
    }


class OtherLabels(DigitsDataModule):
    """The same images and validation split with other labels."""

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        assert self.splits.val_samples is not None
        labels = self.splits["train"].labels
        labels.copy_((labels + 3) % 10)


def test_the_loss_is_the_weighted_sum_of_the_terms(make_trainer: Trainers) -> None:
    net = network()
    before = copy.deepcopy(net).train()
    seen: dict[str, Any] = {}

    class RecordStep(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen["batch"] = batch

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            seen["loss"] = outputs["loss"]

    terms: dict[str, AlignmentLoss | HardTargetLoss] = {"hard": HardTargetLoss(weight=2.0), "mmd": MMDLoss(weight=0.5)}
    trainer = make_trainer(max_steps=1, limit_val_batches=0, callbacks=[RecordStep()])
    trainer.fit(AdaptationModule(net, terms), pair())
    source, target = seen["batch"]["source"], seen["batch"]["target"]
    logits, features = FeatureTap(before, ["avgpool"])(torch.cat([source.images, target.images]))
    vectors = features["avgpool"].flatten(1)
    aligned = mmd_loss(vectors[:128], vectors[128:])
    expected = 2 * hard_target_loss(logits[:128], source.labels) + 0.5 * aligned
    torch.testing.assert_close(seen["loss"], expected)
    assert {"train/hard", "train/mmd", "train/accuracy"} <= trainer.callback_metrics.keys()


def test_training_does_not_depend_on_labels_of_the_target(make_trainer: Trainers) -> None:
    """Only the oracle metrics depend on them."""

    def run(target: DigitsDataModule) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        module = AdaptationModule(network(), losses())
        trainer = make_trainer(max_epochs=2)
        torch.manual_seed(1)
        trainer.fit(module, pair(target=target))
        return module.state_dict(), dict(trainer.callback_metrics)

    (weights, metrics), (other_weights, other_metrics) = run(DigitsDataModule()), run(OtherLabels())
    for name, value in weights.items():
        assert torch.equal(other_weights[name], value), name
    for name in ("train/loss", "train/accuracy", "val/criterion"):
        assert torch.equal(other_metrics[name], metrics[name])
    assert not torch.equal(other_metrics["oracle/loss"], metrics["oracle/loss"])


def test_metrics_of_a_term_are_logged(make_trainer: Trainers) -> None:
    trainer = make_trainer()
    trainer.fit(AdaptationModule(network(), losses()), pair())
    assert {"train/domain", "train/domain_domain_accuracy"} <= trainer.callback_metrics.keys()
    assert 0 <= trainer.callback_metrics["train/domain_domain_accuracy"] <= 1


def test_the_criterion_is_source_accuracy_plus_mutual_information(make_trainer: Trainers) -> None:
    data = pair()
    module = AdaptationModule(network())
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, data)
    module.eval()
    source, target = data.val_dataloader()
    with torch.no_grad():
        probabilities = torch.cat([module(data.augment(batch).images) for batch in target]).softmax(1).double().numpy()
        correct = [module(seen.images).argmax(1) == seen.labels for seen in map(data.augment, source)]
    mean = probabilities.mean(0)
    information = (-(mean * np.log(mean)).sum() + (probabilities * np.log(probabilities)).sum(1).mean()) / np.log(10)
    metrics = trainer.callback_metrics
    assert metrics["val/mutual_information"].item() == pytest.approx(information, abs=1e-4)
    assert metrics["val/criterion"].item() == pytest.approx(
        information + float(torch.cat(correct).double().mean()), abs=1e-4
    )
    labels = torch.cat([data.augment(batch).labels for batch in target]).numpy()
    assert metrics["oracle/accuracy"].item() == pytest.approx((probabilities.argmax(1) == labels).mean(), abs=1e-4)


def test_progress_rises_from_0_to_1_over_the_run(make_trainer: Trainers) -> None:
    progress = []

    class RecordProgress(HardTargetLoss):
        def forward(self, *arguments: Any) -> Tensor:
            progress.append(float(self.progress))
            return super().forward(*arguments)

    trainer = make_trainer(max_epochs=2, limit_val_batches=0)
    trainer.fit(AdaptationModule(network(), {"hard": RecordProgress()}), pair())
    steps = trainer.global_step
    assert progress == pytest.approx([step / steps for step in range(steps)])


def test_an_interrupted_run_resumes_to_identical_weights_and_metrics(make_trainer: Trainers, tmp_path: Path) -> None:
    def run(path: Path | None, callbacks: list[pl.Callback]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        module = AdaptationModule(network(), losses())
        torch.manual_seed(1 if path is None else 9)
        trainer = make_trainer(max_epochs=2, callbacks=callbacks)
        trainer.fit(module, pair(), ckpt_path=path, weights_only=True)
        return module.state_dict(), dict(trainer.callback_metrics)

    weights, metrics = run(None, [SaveAfterEachBatch(tmp_path)])
    for step in (3, 8, 9, 12):
        resumed, metrics_resumed = run(tmp_path / f"{step}.ckpt", [])
        for name, value in weights.items():
            assert torch.equal(resumed[name], value), f"{name} after step {step}"
        for name in ("val/criterion", "oracle/accuracy", "train/loss", "train/mmd"):
            assert torch.equal(metrics_resumed[name], metrics[name]), f"{name} after step {step}"


def test_a_checkpoint_keeps_losses_apart_from_the_network(make_trainer: Trainers, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(AdaptationModule(network(), losses()), pair())
    trainer.save_checkpoint(tmp_path / "adapted.ckpt")
    content = torch.load(tmp_path / "adapted.ckpt", weights_only=True)
    assert {key.partition(".")[0] for key in content["state_dict"]} == {"network", "losses"}
    loaded = AdaptationModule.load_from_checkpoint(tmp_path / "adapted.ckpt", network=network(), losses=losses())
    for name, value in content["state_dict"].items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_an_unknown_layer_and_empty_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="has no layer 'nope'"):
        AdaptationModule(network(), {"mmd": MMDLoss(layers=["nope"])})
    with pytest.raises(ValueError, match="losses must name at least one term"):
        AdaptationModule(nn.Flatten(), {})


@pytest.mark.parametrize("concat", [None, True])
def test_data_without_two_domains_are_refused(make_trainer: Trainers, concat: bool | None) -> None:
    digits = DigitsDataModule()
    data = digits if concat is None else DomainPairDataModule(digits, DigitsDataModule(), concat=True)
    with pytest.raises(ValueError, match="AdaptationModule trains on a source and a target"):
        make_trainer(max_epochs=1).fit(AdaptationModule(network()), data)


def test_a_loss_between_networks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'soft' \(SoftTargetLoss\) compares two networks"):
        AdaptationModule(network(), {"hard": HardTargetLoss(), "soft": SoftTargetLoss()})  # type: ignore[dict-item]
