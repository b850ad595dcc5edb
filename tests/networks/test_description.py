import io

import pytest
import torch
from torch import nn

from kd_lightning.errors import UserError
from kd_lightning.networks import DataConfig, data_config, set_data_config
from kd_lightning.networks.channel_slicing import slice_to, sliced_shapes
from kd_lightning.networks.description import apply_description, describe_network


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))


def test_a_description_is_plain_data_and_gives_another_network_the_same_widths_and_classes() -> None:
    pruned, other, file = build(), build(), io.BytesIO()
    slice_to(pruned, {"0.weight": [3, 4], "0.bias": [3], "1.weight": [2, 3], "1.bias": [2]})
    set_data_config(pruned, DataConfig.of([0.5], [0.2], ["cat", "dog"]))
    torch.save(describe_network(pruned), file)
    file.seek(0)
    apply_description(other, torch.load(file, weights_only=True))
    assert data_config(other) == data_config(pruned)
    assert sliced_shapes(other) == sliced_shapes(pruned)
    other.load_state_dict(pruned.state_dict())


def test_a_network_that_was_never_pruned_keeps_its_widths() -> None:
    network = build()
    description = describe_network(build())
    assert "sliced_shapes" not in description
    apply_description(network, description)
    assert network[0].out_features == 8
    assert sliced_shapes(network) is None


def test_a_damaged_description_is_refused() -> None:
    with pytest.raises(UserError, match="give both or neither"):
        apply_description(build(), {"data_config": {"mean": [0.5]}})
    with pytest.raises(UserError, match="build the network that was pruned"):
        apply_description(build(), {"sliced_shapes": {"0.weight": [9, 4]}})
