"""Masked weights stay at zero."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from resume_check import SaveAfterEachBatch
from torch import Tensor, nn

from kd_lightning import DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.callbacks import MaskWeights, PruneNetwork
from kd_lightning.callbacks.mask import magnitude_masks, semi_structured_masks
from kd_lightning.networks import ResNet

Networks = Callable[..., ResNet]
Trainers = Callable[..., pl.Trainer]
OPTIMIZERS: dict[str, Any] = {"SGD": None, "AdamW": partial(torch.optim.AdamW, lr=0.01)}


def zero_fraction(network: nn.Module) -> float:
    weights = torch.cat([m.weight.flatten() for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)])
    return float((weights == 0).float().mean())


def test_the_smallest_weights_of_all_layers_are_masked(small: Networks) -> None:
    network = small()
    masks = magnitude_masks(network, 0.7)
    weights = torch.cat([network.get_parameter(name).detach().abs().flatten() for name in masks])
    kept = torch.cat([mask.flatten() for mask in masks.values()])
    assert weights[kept].min() >= weights[~kept].max()
    assert float((~kept).float().mean()) == pytest.approx(0.7, abs=1e-3)
    assert zero_fraction(network) == 0


def test_two_of_four_input_channels_are_kept() -> None:
    layer = nn.Conv2d(8, 5, 3)
    network = nn.Sequential(layer, nn.Conv2d(6, 2, 1))
    masks = semi_structured_masks(network)
    assert list(masks) == ["0.weight"]
    mask, weight = masks["0.weight"], layer.weight.detach().abs()
    for first in (0, 4):
        part, sizes = mask[:, first : first + 4], weight[:, first : first + 4]
        assert (part.sum(1) == 2).all()
        assert (torch.where(part, sizes, 9).amin(1) >= torch.where(part, 0, sizes).amax(1)).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masked_weights_stay_zero_during_training(optimizer: str, small: Networks, make_trainer: Trainers) -> None:
    seen: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            seen.append(zero_fraction(pl_module.network))

    teacher, student = small(), small()
    before = copy.deepcopy(teacher.state_dict())
    module = DistillationModule(student, teacher, teacher_check="off", optimizer=OPTIMIZERS[optimizer])
    trainer = make_trainer(max_epochs=3, callbacks=[MaskWeights(0.8, epochs=[0, 2]), Watch()])
    trainer.fit(module, DigitsDataModule(batch_size=256))
    half = len(seen) * 2 // 3
    assert all(fraction == pytest.approx(0.4, abs=0.01) for fraction in seen[:half])
    assert all(fraction == pytest.approx(0.8, abs=0.01) for fraction in seen[half:])
    assert module.teacher is not None
    assert all(torch.equal(value, module.teacher.state_dict()[name]) for name, value in before.items())
    assert set(module.network.state_dict()) == set(before)


@pytest.mark.parametrize("step", [2, 5])
def test_an_interrupted_run_resumes_to_identical_weights(
    step: int, small: Networks, make_trainer: Trainers, tmp_path: Path
) -> None:
    network = small()

    def run(*callbacks: pl.Callback, path: Path | None = None) -> dict[str, Tensor]:
        module = TeacherModule(copy.deepcopy(network))
        trainer = make_trainer(max_epochs=2, callbacks=[MaskWeights(pattern="2:4"), *callbacks])
        trainer.fit(module, DigitsDataModule(batch_size=256), ckpt_path=path, weights_only=True)
        return module.state_dict()

    expected = run(SaveAfterEachBatch(tmp_path))
    resumed = run(path=tmp_path / f"{step}.ckpt")
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name
    weight = expected["network.layer2.0.conv2.weight"]
    assert ((weight != 0).view(8, 2, 4, 3, 3).sum(2) <= 2).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a sparsity"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "must not have one"),
        ({"sparsity": 1.0}, "must be between 0 and 1"),
        ({"sparsity": 0.5, "epochs": [-1]}, "different numbers >= 0"),
        ({"pattern": "2:4", "epochs": [0, 1]}, "is applied in a single epoch"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskWeights(**options)


def test_masking_and_pruning_in_one_run_is_refused(small: Networks, make_trainer: Trainers) -> None:
    trainer = make_trainer(callbacks=[MaskWeights(0.5), PruneNetwork()])
    with pytest.raises(ValueError, match="use only one of them in a run"):
        trainer.fit(TeacherModule(small()), DigitsDataModule(batch_size=256))
