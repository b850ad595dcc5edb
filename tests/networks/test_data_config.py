import copy
import io
import json
from typing import Any

import pytest
import torch
from torch import nn

from kd_lightning.files.prepare import Preparation
from kd_lightning.networks import DataConfig, data_config, set_data_config
from kd_lightning.networks.data_config import check_same_classes, train_on


def test_values_become_floats_and_strings() -> None:
    as_in_a_file: dict[str, Any] = {"mean": [0, 1], "std": [1, 2], "classes": [3, "cat"]}
    known = DataConfig.of(**as_in_a_file)
    assert known.mean == (0.0, 1.0)
    assert known.std == (1.0, 2.0)
    assert known.classes == ("3", "cat")
    assert [type(value) for value in (*known.mean, *known.std)] == [float] * 4


def test_fields_are_none_by_default() -> None:
    assert DataConfig.of() == DataConfig() == (None,) * 6
    assert data_config(nn.Linear(1, 1)) == DataConfig()


def test_the_configuration_is_copied_with_a_network_and_not_in_its_state_dict() -> None:
    network = nn.Linear(1, 1)
    set_data_config(network, DataConfig.of([0.5], [0.25], ["a"], Preparation.of(8), [6, 6], [0.3]))
    expected = (0.5,), (0.25,), ("a",), Preparation.of(8), (6, 6), (0.3,)
    assert data_config(copy.deepcopy(network)) == expected
    assert set(network.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("given", [{"mean": [0.5]}, {"std": [0.5]}])
def test_a_mean_or_std_alone_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^mean and std describe the input together; give both or neither\.$"):
        DataConfig.of(**given)


@pytest.mark.parametrize(
    ("mean", "std"), [([0.5], [0.5, 0.5]), ([0.5], [0.0]), ([0.5], [-1.0]), ([0.5], [float("nan")]), ([], [])]
)
def test_invalid_statistics_are_refused(mean: list[float], std: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^mean and std need one value for each channel and deviations above 0, got "):
        DataConfig.of(mean, std)


@pytest.mark.parametrize("preparation", [None, Preparation.of((8, 9), 12, mode="border", fill=(1, 2, 3))])
def test_plain_data_makes_the_configuration_again(preparation: Preparation | None) -> None:
    known = DataConfig.of([0.5, 0.4, 0.3], [0.2] * 3, ["a", "b"], preparation, preparation and (6, 7), [0.5, 0.25])
    buffer = io.BytesIO()
    torch.save(known.as_plain(), buffer)
    assert DataConfig.of(**json.loads(json.dumps(known.as_plain()))).train_size == known.train_size
    assert DataConfig.of(**torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)) == known


@pytest.mark.parametrize("thresholds", [[], [0.5], [0.5, 1.5], [0.5, float("nan")], [0.5] * 3])
def test_thresholds_that_are_not_one_for_each_class_are_refused(thresholds: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^thresholds need one probability in \[0, 1\] for each class, got \["):
        DataConfig.of(classes=["a", "b"], thresholds=thresholds)


def test_thresholds_stay_while_the_classes_are_the_same() -> None:
    network = nn.Linear(1, 1)
    set_data_config(network, DataConfig.of(classes=["a", "b"], thresholds=[0.3, 0.4]))
    train_on(network, DataConfig.of(classes=["a", "b"], thresholds=[0.5, 0.5]))
    assert data_config(network).thresholds == (0.3, 0.4)
    train_on(network, DataConfig.of(classes=["a", "c"], thresholds=[0.5, 0.5]))
    assert data_config(network).thresholds == (0.5, 0.5)
    train_on(network, DataConfig.of(classes=["a", "c"]))
    assert data_config(network).thresholds is None


def test_a_training_size_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^A size must be a number of pixels, or height and width, got \(6,\)\.$"):
        DataConfig.of(train_size=[6])


def test_a_network_keeps_both_sizes_of_the_data_that_it_is_trained_on() -> None:
    network = nn.Linear(1, 1)
    set_data_config(network, DataConfig.of(preparation=Preparation.of(8), train_size=[6, 6]))
    train_on(network, DataConfig())
    assert data_config(network)[3:5] == (Preparation.of(8), (6, 6))
    train_on(network, DataConfig.of(preparation=Preparation.of(9)))
    assert data_config(network)[3:5] == (Preparation.of(9), None)


def test_imagenets_folders_have_the_classes_of_published_networks() -> None:
    check_same_classes(
        "The network", DataConfig.of(classes=["tench", "goldfish"]), DataConfig.of(classes=["n01440764"])
    )
    with pytest.raises(ValueError, match=r"^The network was trained on the classes tench and the data have n0144; "):
        check_same_classes("The network", DataConfig.of(classes=["tench"]), DataConfig.of(classes=["n0144"]))


def test_a_network_of_other_classes_needs_another_head() -> None:
    message = r"^The teacher was trained on the classes a, b, c and the data have a, b; give it a head .* replace_head"
    with pytest.raises(ValueError, match=message):
        check_same_classes("The teacher", DataConfig.of(classes=["a", "b", "c"]), DataConfig.of(classes=["a", "b"]))
    with pytest.raises(ValueError, match=r"and the data have b, a; the order and the names must be the same\.$"):
        check_same_classes("The teacher", DataConfig.of(classes=["a", "b"]), DataConfig.of(classes=["b", "a"]))
