"""The memory format of networks: channels-last where it is safe."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule, TeacherModule
from kd_lightning.networks import ResNet
from kd_lightning.networks.memory_format import overruns_channels_last

Trainers = Callable[..., pl.Trainer]


def is_channels_last(network: nn.Module) -> bool:
    weight = network.get_parameter("layer2.0.conv1.weight")
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_strided_convolutions_of_one_pixel_and_few_channels_are_found() -> None:
    safe: list[dict[str, Any]] = [{"kernel_size": 3, "stride": 2}, {"kernel_size": 1}, {"kernel_size": 2, "stride": 2}]
    assert not any(overruns_channels_last(nn.Sequential(nn.Conv2d(8, 16, **options))) for options in safe)
    assert overruns_channels_last(nn.Sequential(nn.ReLU(), nn.Conv2d(15, 16, 1, stride=(1, 2))))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_narrow_network_is_trained_on_photographs(make_trainer: Trainers, caplog: pytest.LogCaptureFixture) -> None:
    """In channels-last the process would crash, or its memory be damaged."""
    loader = DataLoader(TensorDataset(torch.rand(8, 3, 96, 96), torch.arange(8)), batch_size=4)
    narrow, wide = ResNet([1, 1], [8, 16]), ResNet([1, 1], [16, 32])
    with caplog.at_level("INFO"):
        make_trainer().fit(DistillationModule(narrow, ResNet([1, 1], [8, 16]), teacher_check="off"), loader, loader)
    assert "contiguous memory, since its strided 1x1 convolutions of few channels crash" in caplog.text
    assert not is_channels_last(narrow)
    make_trainer().fit(TeacherModule(wide), loader, loader)
    assert is_channels_last(wide)
    make_trainer().test(TeacherModule(narrow), loader, verbose=False)
    assert is_channels_last(narrow), "without a gradient there is no danger"
