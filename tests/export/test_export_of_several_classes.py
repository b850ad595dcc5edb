"""A file of several classes an image: its thresholds, its probabilities, and what its agreement is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from kd_lightning.export import OnnxClassifier, export_network
from kd_lightning.export.network import _agreement
from kd_lightning.networks import DataConfig, ResNet, data_config, from_checkpoint, set_data_config


def network(thresholds: list[float] | None) -> ResNet:
    torch.manual_seed(0)
    made = ResNet([1], [4], 3).eval()
    set_data_config(made, DataConfig.of([0.5] * 3, [0.25] * 3, ["ant", "bee", "tall"], thresholds=thresholds))
    return made


def test_the_file_holds_the_thresholds_and_gives_a_probability_of_each_class(tmp_path: Path) -> None:
    made, images = network([0.3, 0.5, 0.7]), torch.rand(4, 3, 8, 8)
    export_network(made, tmp_path / "a.onnx", images)
    classifier = OnnxClassifier(tmp_path / "a.onnx")
    assert classifier.thresholds == json.loads(classifier.metadata["thresholds"]) == [0.3, 0.5, 0.7]
    expected = made((images - 0.5) / 0.25).sigmoid().detach().numpy()
    np.testing.assert_allclose(classifier.probabilities(images.numpy()), expected, atol=1e-5)
    export_network(made, tmp_path / "a.safetensors", images, format="safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["thresholds"]) == [0.3, 0.5, 0.7]
    assert data_config(from_checkpoint(network(None), tmp_path / "a.safetensors")).thresholds == (0.3, 0.5, 0.7)


def test_a_file_of_one_class_an_image_has_none_and_its_rows_sum_to_one(tmp_path: Path) -> None:
    images = torch.rand(4, 3, 8, 8)
    export_network(network(None), tmp_path / "a.onnx", images)
    classifier = OnnxClassifier(tmp_path / "a.onnx")
    assert classifier.thresholds is None
    assert "thresholds" not in classifier.metadata
    np.testing.assert_allclose(classifier.probabilities(images.numpy()).sum(1), 1)


@pytest.mark.filterwarnings("error")
def test_probabilities_of_large_logits_do_not_overflow(tmp_path: Path) -> None:
    made = network([0.5] * 3)
    made.fc.weight.data.zero_()
    made.fc.bias.data.copy_(torch.tensor([-1e4, 0.0, 1e4]))
    export_network(made, tmp_path / "a.onnx")
    images = np.zeros((1, 3, 32, 32), np.float32)
    assert OnnxClassifier(tmp_path / "a.onnx").probabilities(images).tolist() == [[0, 0.5, 1]]


def test_a_file_that_gives_no_class_does_not_agree() -> None:
    expected = torch.full((50, 20), -5.0)
    expected[:, 0] = 5.0  # one class of twenty: 95 per cent of the decisions are "no"
    thresholds = (0.5,) * 20
    assert _agreement(torch.full_like(expected, -5.0), expected, thresholds) == 0
    assert _agreement(expected, expected, thresholds) == 1
    half = expected.clone()
    half[:25, 0] = -5.0
    assert _agreement(half, expected, thresholds) == pytest.approx(2 * 25 / 75)
    assert _agreement(-expected.abs(), -expected.abs(), thresholds) == 1  # neither gives a class
