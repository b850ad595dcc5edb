"""The README of the losses: its example runs, and its tables name every loss and every recipe."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml

import kd_lightning.losses
from kd_lightning import DigitsDataModule, DistillationModule
from kd_lightning.features import Outputs
from kd_lightning.losses import DistillationLoss, HardTargetLoss, WKDLogitLoss
from kd_lightning.networks import ResNet
from kd_lightning.recipes import recipe_names

README = (Path(kd_lightning.losses.__file__).parent / "README.md").read_text()
COSTS, CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
(CONFIGURATION,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)


def test_a_loss_of_your_own_takes_about_ten_lines() -> None:
    body = CODE.split("class PooledLoss")[1].splitlines()[1:]
    assert len([line for line in body if line.strip()]) <= 10


def test_the_example_trains_a_student(small: Callable[..., ResNet], make_trainer: Callable[..., pl.Trainer]) -> None:
    namespace: dict[str, Any] = {}
    exec(CODE, namespace)
    named = yaml.safe_load(CONFIGURATION)["model"]["init_args"]["losses"]["pooled"]
    assert named["class_path"] == "my_losses.PooledLoss"
    pooled = namespace["PooledLoss"](**named["init_args"])
    losses: dict[str, DistillationLoss] = {"hard": HardTargetLoss(), "pooled": pooled}
    module = DistillationModule(small(), small(8), losses=losses, teacher_check="off")
    trainer = make_trainer(limit_train_batches=3)
    trainer.fit(module, DigitsDataModule(batch_size=32))
    assert torch.isfinite(trainer.callback_metrics["train/pooled"])
    assert pooled.weight == 10.0
    assert [tuple(weight.shape) for weight in pooled.parameters()] == [(16, 8), (16,)]


def test_costs_of_the_teachers_features_are_made_from_the_file_that_predict_writes(
    small: Callable[..., ResNet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    labels = np.arange(60) % 10
    np.savez("features.npz", avgpool=np.random.default_rng(0).normal(size=(60, 4, 1, 1)), labels=labels)
    exec(COSTS, {})
    loss = WKDLogitLoss(cost_matrix="costs.pt")
    outputs = Outputs(torch.randn(4, 10))
    loss.build(outputs, outputs, teacher_network=small())
    assert loss.costs.shape == (10, 10)
    assert loss(outputs, Outputs(torch.randn(4, 10)), torch.arange(4)).isfinite()


@pytest.mark.parametrize("name", [name for name in kd_lightning.losses.__all__ if name.endswith("Loss")])
def test_every_class_is_named(name: str) -> None:
    assert f"`{name}`" in README or f"`{name}(" in README or name in ("DistillationLoss", "AlignmentLoss")


def test_every_recipe_of_the_tables_exists() -> None:
    named = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    existing = {name.partition("/")[2] for name in recipe_names() if name.startswith("digits/")}
    others = {"ema", "simkd", "born_again", "prune", "qat", "student", "teacher"}
    assert named == existing - others
