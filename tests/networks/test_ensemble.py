from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from kd_lightning import DigitsDataModule, DistillationModule
from kd_lightning.losses import HardTargetLoss, HintLoss
from kd_lightning.networks import DataConfig, EnsembleTeacher, ResNet, set_data_config

Networks = Callable[..., ResNet]


@pytest.mark.parametrize(("weights", "shares"), [(None, (0.5, 0.5)), ([1.0, 3.0], (0.25, 0.75)), ([0, 2], (0.0, 1.0))])
def test_logits_or_probabilities_are_averaged(small: Networks, weights: Any, shares: tuple[float, float]) -> None:
    first, second, images = small().eval(), small(8).eval(), torch.randn(5, 1, 8, 8)
    a, b = first(images), second(images)
    logits = EnsembleTeacher([first, second], "logits", weights).eval()(images)
    torch.testing.assert_close(logits, shares[0] * a + shares[1] * b)
    logits = EnsembleTeacher([first, second], "probabilities", weights).eval()(images)
    torch.testing.assert_close(logits.softmax(1), shares[0] * a.softmax(1) + shares[1] * b.softmax(1))
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(5))


def test_saturated_members_stay_finite() -> None:
    class Saturated(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[1e4, -1e4], [-1e4, 1e4]])

    logits = EnsembleTeacher([Saturated(), Saturated()], "probabilities")(torch.zeros(2, 1))
    assert torch.isfinite(logits).all()


def test_images_are_normalized_for_each_member(small: Networks) -> None:
    network, images = small().eval(), torch.rand(4, 1, 8, 8)
    members = [network, small().eval()]
    members[1].load_state_dict(network.state_dict())
    set_data_config(members[0], DataConfig.of([0.5], [0.5]))
    set_data_config(members[1], DataConfig.of([0.0], [1.0]))
    ensemble = EnsembleTeacher(members).eval()
    assert ensemble.data_config.mean == (0.5,)
    expected = (network((images - 0.5) / 0.5) + network(images)) / 2
    torch.testing.assert_close(ensemble((images - 0.5) / 0.5), expected)


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (0, {}, "Give one weight for each network, got 0 networks, 0 weights"),
        (2, {"weights": [1.0]}, "got 2 networks, 1 weights"),
        (2, {"weights": [1.0, -1.0]}, r"must be >= 0 and not all 0, got \[1.0, -1.0\]"),
        (2, {"weights": [0.0, 0.0]}, "not all 0"),
        (1, {"weights": [float("nan")]}, "must be >= 0"),
        (1, {"average": "votes"}, "average must be 'logits' or 'probabilities', got 'votes'"),
    ],
)
def test_invalid_arguments_are_refused(small: Networks, count: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnsembleTeacher([small() for _ in range(count)], **options)


def test_members_with_different_classes_are_refused(small: Networks) -> None:
    members = [small(), small(), small()]
    set_data_config(members[1], DataConfig.of(classes="0123456789"))
    set_data_config(members[2], DataConfig.of(classes="abcdefghij"))
    with pytest.raises(ValueError, match=r"^Network 2 of the ensemble was trained on the classes a, b"):
        EnsembleTeacher(members)


def test_an_ensemble_teaches_logits_and_features(small: Networks, make_trainer: Callable[..., pl.Trainer]) -> None:
    teacher = EnsembleTeacher([small(8), small(4)], weights=[2.0, 1.0])
    state = {key: value.clone() for key, value in teacher.state_dict().items()}
    losses = {
        "hard": HardTargetLoss(),
        "hint": HintLoss(weight=1.0, student_layers=["layer2"], teacher_layers=["networks.0.layer2"]),
    }
    data = DigitsDataModule(batch_size=256)
    for options in ({}, {"losses": losses}):
        module = DistillationModule(small(), teacher, teacher_check="off", **options)  # type: ignore[arg-type]
        make_trainer().fit(module, data)
        assert module.teacher is not None
        for key, value in module.teacher.state_dict().items():
            assert torch.equal(value, state[key]), key
